"""Whatever JSON a file holds: a task reads it, or says in one sentence what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from itprune.tasks import find_task

KEYS = st.sampled_from(
    """id question_id image_id imageId image images question text label answer answers category kind
    data questions annotations answer_type data_subtype types structural choices hint subject split
    test conversations messages prompt from value role content 1""".split()  # noqa: SIM905
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 3), st.floats(allow_nan=False),
    st.sampled_from(["", "yes", "A", "human", "gpt", "user", "OCR", "a.png", "\n"]),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6)
)
JSON_TASKS = ("vqav2", "textvqa", "gqa", "scienceqa", "pope", "mme", "records")


@pytest.mark.parametrize("name", JSON_TASKS)
@given(st.lists(VALUES, min_size=1, max_size=2))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_json(tmp_path: Path, name: str, contents: list[Any]) -> None:
    files = []
    for number, content in enumerate(contents):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(content), encoding="utf-8")
    try:
        task = find_task(name).read(files, None, {})
    except ValueError as error:
        assert "\n" not in str(error)
        return
    for item in task.items:
        assert 0 <= task.score(item, "yes")["score"] <= 1
    assert task.metric in task.total(task.items, [task.score(i, "A") for i in task.items])
