"""What is asked and what is kept: samples set aside, groups whole, files of answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest

from itprune.comparing.entries import Case, Entry
from itprune.evaluating.answers import Answers, file_name
from itprune.evaluating.questions import by_picture, split
from itprune.tasks.base import Item, Task


class Pairs(Task):
    """Twelve groups of two questions; those of a group show different pictures."""

    name, needs, metric = "pairs", "nothing", "accuracy"

    def read_items(self) -> Iterable[Item]:
        for group in range(12):
            for half in "ab":
                yield Item(
                    f"{group}{half}",
                    {"prompt": "?", "image": f"{group}{half}.png"},
                    ("yes",),
                    facts={"group": str(group)},
                    pictures={f"{group}{half}.png": b"png"},
                )

    def score(self, item: Item, answer: str) -> dict[str, float]:
        return {"score": 0.0}

    def total(
        self, items: Sequence[Item], scores: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        return {"accuracy": 0.0}

    def group(self, item: Item) -> str:
        return str(item.facts["group"])


@pytest.fixture
def pairs(tmp_path: Path) -> Task:
    (tmp_path / "file.json").write_text("{}")
    return Pairs.read([tmp_path / "file.json"], None, {})


def groups(ids: Iterable[str]) -> set[str]:
    return {name[:-1] for name in ids}


def test_a_group_is_on_one_side_and_whole(pairs: Task) -> None:
    parts = split(pairs, None, 64)
    scored = [sample.item.id for sample in parts.scored]
    fitted = [sample.name for sample in parts.calibration]
    assert fitted
    assert not groups(scored) & groups(fitted)
    assert len(scored) == 2 * len(groups(scored))
    assert split(pairs, None, 64) == parts  # every call sees the same


@pytest.mark.parametrize(("limit", "count"), [(1, 2), (4, 4), (5, 6), (24, 24), (100, 24)])
def test_a_limit_takes_whole_groups(pairs: Task, limit: int, count: int) -> None:
    scored = [sample.item.id for sample in split(pairs, limit, 0).scored]
    assert len(scored) == count == 2 * len(groups(scored))
    assert scored == [item.id for item in pairs.items if item.id in set(scored)]


def test_questions_about_a_picture_stand_side_by_side(pairs: Task) -> None:
    """And otherwise keep their order."""
    scored = split(pairs, None, 0).scored
    assert by_picture(scored) == scored  # a picture each
    assert by_picture([*scored, *scored]) == [one for one in scored for _ in range(2)]


def test_data_to_calibrate_on_must_show_pictures(pairs: Task, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"prompt": "no picture"}\n')
    with pytest.raises(ValueError, match="no record shows a picture"):
        split(pairs, None, 8, tmp_path / "text.jsonl")


# ------------------------------------------------------------------------------------ files
def case(text: str = "uniform", keep: float = 0.5, seed: int | None = None) -> Case:
    return Case(Entry(text, text), keep, seed)


def test_cases_that_differ_have_files_that_differ() -> None:
    cases = [
        case(), case(keep=0.25), case(seed=1), case(seed=2), case("dense", 1.0), case("a+b"),
        case("a:x=1"), case("a:x=[1]"), case("a:x=(1)"), case("a_x_1"), case("../../etc/passwd"),
        case("a:x=" + "9" * 300), case("a:x=" + "9" * 301),
    ]  # fmt: skip
    names = [file_name(one) for one in cases]
    assert len(set(names)) == len(cases)
    assert all("/" not in name and len(name) < 120 for name in names)
    assert names[:2] == ["uniform-0.5", "uniform-0.25"]
    assert names[4:6] == ["dense", "a+b-0.5"]


def said(name: str, answer: str = "x") -> dict[str, str]:
    return {"id": name, "answer": answer}


def test_parts_are_joined_and_half_lines_cut(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "run", case())
    assert answers.read() == {}
    answers.append(0, [said("1"), said("2")])
    answers.append(3, [said("5"), {"id": "6", "error": "sample 6: unreadable"}])
    part = answers.path.with_name(f"{answers.path.name}.rank0")
    part.write_bytes(part.read_bytes() + '{"id": "3", "answer": "ä'.encode()[:-1])
    assert set(answers.read()) == {"1", "2", "5", "6"}
    answers.fold()
    assert [json.loads(line)["id"] for line in answers.path.read_text().splitlines()] == list(
        "1256"
    )
    assert not part.exists()
    answers.append(1, [said("2", "y")])
    assert answers.read()["2"]["answer"] == "y"  # the last one counts
    answers.fold(retry=True)
    assert set(answers.read()) == {"1", "2", "5"}


def test_the_case_is_prepared_once_and_a_reason_is_forgotten_on_demand(tmp_path: Path) -> None:
    answers = Answers(tmp_path, case())
    assert answers.head() is None
    answers.put_head({"reason": "too small"})
    assert answers.head() == {"method": "uniform", "keep": 0.5, "seed": None, "reason": "too small"}
    answers.fold()
    assert answers.head() is not None
    answers.fold(retry=True)
    assert answers.head() is None
    answers.put_head({"calibration": None})
    answers.fold(retry=True)
    assert answers.head() is not None
    answers.head_path.write_text("[1]")
    with pytest.raises(ValueError, match="not written by `itprune eval`"):
        answers.head()


@pytest.mark.parametrize("line", ["[]", "{}", '{"id": 3, "answer": ""}', '{"id": "3"}', "x"])
def test_other_lines_are_told_apart(tmp_path: Path, line: str) -> None:
    answers = Answers(tmp_path, case())
    answers.path.write_text(json.dumps(said("1")) + "\n" + line + "\n")
    with pytest.raises(ValueError, match="line 2 is not an answer of `itprune eval`"):
        answers.read()
