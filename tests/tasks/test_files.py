"""Errors of files that all readers share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from itprune.tasks.files import read_json, text_of


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r":1: not valid JSON"),
        (b'{"a":\n1,}', r":2: not valid JSON"),
        (b"\xff\xfe", "not UTF-8 text"),
    ],
)
def test_json_that_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "`a` is missing"), (True, "got bool"), ([1], "got list"), (1.5, "got float")],
)
def test_a_field_that_is_no_text(value: Any, message: str) -> None:
    assert text_of({"a": 5}, "a", "here") == "5"
    with pytest.raises(ValueError, match=f"here: .*{message}"):
        text_of({"a": value}, "a", "here")
