"""docs/models.md is true: its tables are the data of tests/family_support.py, and tests of this
suite make every tick in them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest

from itprune.families import family_class, find_family
from itprune.families.base import PatchFamily
from tests.family_models import NAMES, build
from tests.family_oracle import rows_of
from tests.family_pictures import main, scene_scores
from tests.family_support import (
    FEATURES,
    FILES,
    METHOD_ROWS,
    OLDEST,
    SHRINKS,
    TITLES,
    TORCHVISION,
    Row,
    rendered,
)
from tests.tiny_folders import MAKERS

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "models.md").read_text()
ROWS = (*FEATURES, *METHOD_ROWS)


@pytest.fixture(scope="module")
def collected() -> dict[str, list[str]]:
    """`file::function` -> parameters of each of its runs, as pytest finds them."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--collect-only", "-q"]
    answer = subprocess.run(
        [*command, "-p", "no:cacheprovider", *FILES], cwd=ROOT, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stdout[-2000:]
    found = defaultdict(list)
    for line in answer.stdout.splitlines():
        test, _, parameters = line.partition("[")
        found[test].append(parameters.removesuffix("]"))
    return found


def missing(row: Row, name: str, collected: dict[str, list[str]]) -> list[str]:
    """What a tick claims and no test shows."""
    out = []
    for test in row.instead.get(name, row.tests):
        test, _, picked = test.partition("[")
        runs = [set(run.split("-")) | {run} for run in collected.get(test, [])]
        if picked:
            wanted = {picked.removesuffix("]")}
        else:
            wanted = set(row.also) | (set() if name in row.instead else {name})
            runs = [run for run in runs if name in row.instead or name in run]
        if not runs or not wanted <= set().union(*runs):
            out.append(f"{row.title} in {name}: {test} {sorted(wanted)}")
    return out


def test_the_tables_are_the_data() -> None:
    hint = "replace the tables and notes in docs/models.md by `python -m tests.family_support`"
    assert rendered() in DOCUMENT, hint


def test_every_tick_is_made_by_a_test(collected: dict[str, list[str]]) -> None:
    ticks = [(row, name) for row in ROWS for name in TITLES if name not in row.crosses]
    assert all(row.instead.get(name, row.tests) for row, name in ticks)
    assert not [gap for row, name in ticks for gap in missing(row, name, collected)]


def test_every_cross_has_its_reason_and_refusals_a_test(collected: dict[str, list[str]]) -> None:
    for row in ROWS:
        for said in (row.crosses, row.notes, row.optional, row.instead):
            assert set(said) <= set(TITLES)
            assert all(said.values())
        if row.refusal:
            method = "-" + row.title.strip("`") if row in METHOD_ROWS else ""
            tests = [test for test in collected if test.startswith(row.refusal)]
            refused = [run for test in tests for run in collected[test]]
            for name in row.crosses:
                assert f"{name}{method}" in refused, f"{row.title} in {name}"


def test_a_tick_without_a_test_is_noticed(collected: dict[str, list[str]]) -> None:
    row = next(row for row in FEATURES if row.title == "beams")
    assert not missing(row, "gemma3", collected)
    assert missing(row, "aya_vision", collected)
    assert missing(Row("nothing", ("tests/test_bench.py::test_nothing",)), "llava", collected)
    (picked,) = METHOD_ROWS[0].instead["llava"][:1]
    wrong = Row("wrong", (), instead={"llava": (picked.replace("llava", "gemma3"),)})
    assert missing(wrong, "llava", collected)


def test_the_columns_are_the_families() -> None:
    assert set(TITLES) == set(NAMES)
    sections = set(re.findall(r"^### .*?\(`(\w+)`", DOCUMENT, re.M))
    sections |= set(re.findall(r"^### .*?, `(\w+)`\)", DOCUMENT, re.M))
    assert sections == {build(name).config.model_type for name in NAMES}


def test_rows_of_the_oracles_are_what_the_titles_say() -> None:
    for name in NAMES:
        rows = [[part for part in row if isinstance(part, str)] for row in rows_of(name)]
        visual = [sum(part in {"image", "wide", "video"} for part in row) for row in rows]
        assert max(visual) > 1
        assert min(visual) == 0


def test_which_families_shrink_pixels() -> None:
    for name in NAMES:
        family = family_class(build(name).config.model_type)
        base = [cls for cls in family.__mro__ if "shrink" in vars(cls)]
        shrinks = issubclass(family, PatchFamily) or base[0].__name__ == "Qwen2Vl"
        assert shrinks == (name in SHRINKS)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is there")
def test_which_processors_need_torchvision() -> None:
    needy = set()
    for name, maker in MAKERS.items():
        try:
            maker.processor()
        except ImportError:
            needy.add(name)
    assert needy == set(TORCHVISION)


def test_the_oldest_versions_run_what_is_ticked() -> None:
    recipe = (ROOT / "Makefile").read_text()
    assert "test-oldest:" in recipe
    assert all(file in recipe for file in OLDEST)
    assert {test.split("::")[0] for test in FEATURES[-1].tests} <= set(OLDEST)


@pytest.mark.parametrize("name", NAMES)
def test_the_score_is_what_the_document_says(name: str) -> None:
    """Which families have a class token stands in the table of geometries."""
    table = DOCUMENT.split("## Where tokens come from")[1]
    line = next(row for row in table.splitlines() if row.startswith(f"| {TITLES[name]} "))
    assert ("CLS" in line.split("|")[3]) == find_family(build(name)).has_cls


def test_the_pictures_can_be_drawn_again(tmp_path: Path) -> None:
    main(tmp_path)
    for name in ("models_geometry.png", "models_scores.png"):
        assert f"]({name})" in DOCUMENT
        for folder in (tmp_path, ROOT / "docs"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_both_scores_agree_on_the_bundled_scenes() -> None:
    """As the caption says, of this encoder."""
    _, by_cls, received = scene_scores(4, seed=3)
    for one, other in zip(by_cls, received, strict=True):
        best = [set(score.topk(32).indices.tolist()) for score in (one, other)]
        assert len(best[0] & best[1]) > 24
