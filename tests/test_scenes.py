"""The scenes are real, repeatable, and every question has the one answer it is given."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.scenes import (
    BASE,
    answers,
    choose_kinds,
    majority_accuracy,
    write_dataset,
)
from train.scenes.questions import SETS, Item, scene_items
from train.scenes.render import COLOUR_NAMES, draw_scenes, sample_scenes, sources


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    write_dataset(out, train=120, val=80, seed=3, questions="all")
    return out


def read(data: Path, split: str) -> list[dict]:
    return json.loads((data / f"{split}.json").read_text())


def test_same_seed_same_files(data: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path, train=120, val=80, seed=3, questions="all")
    for path in sorted(data.rglob("*.*")):
        assert path.read_bytes() == (tmp_path / path.relative_to(data)).read_bytes(), path.name


def test_another_seed_other_scenes(data: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path, train=120, val=80, seed=4, questions="all")
    assert (data / "train.json").read_bytes() != (tmp_path / "train.json").read_bytes()


def test_splits_share_no_handwriting() -> None:
    train, val = sources("train"), sources("val")
    assert not set(train.index) & set(val.index)
    assert len(train.index) + len(val.index) == 1797
    assert set(train.labels) == set(val.labels) == set(range(10))
    assert len({image.tobytes() for image in val.images}) == len(val.images)
    assert not {i.tobytes() for i in train.images} & {i.tobytes() for i in val.images}


def test_samples_have_llava_form(data: Path) -> None:
    for split, size in (("train", 120), ("val", 80)):
        samples = read(data, split)
        assert len(samples) == size
        assert len({sample["id"] for sample in samples}) == size
        for sample in samples:
            assert ("kind" in sample) == (split == "val")
            turns = sample["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            first = turns[0]["value"]
            assert first.startswith("<image>\n") == ("image" in sample)
            assert sum(turn["value"].count("<image>") for turn in turns) == ("image" in sample)


def test_pictures_are_real_files(data: Path) -> None:
    for sample in read(data, "train") + read(data, "val"):
        if "image" in sample:
            picture = Image.open(data / sample["image"])
            assert picture.format == "PNG"
            assert picture.size == (96, 96)
            assert picture.mode == "RGB"


def test_every_kind_occurs_with_multi_turn_and_text_only(data: Path) -> None:
    val = read(data, "val")
    assert {sample["kind"] for sample in val} == set(SETS["all"])
    several = {sample["kind"] for sample in val if len(sample["conversations"]) > 2}
    assert len(several) >= 2
    assert {sample["kind"] for sample in val if "image" not in sample} >= {
        "larger_in_text",
        "scene_in_text",
    }


def test_quickstart_questions_are_held_out() -> None:
    rng = np.random.default_rng(0)
    scenes = sample_scenes(rng, 100, "train")
    asked: dict[str, set[str]] = {"base": set(), "quickstart": set()}
    for name in asked:
        for index in range(100):
            for kind in choose_kinds(name).values():
                dialogue = kind(scene_items(scenes, index), rng)
                if dialogue:
                    asked[name] |= {question for question, _ in dialogue.turns}
    assert not asked["base"] & asked["quickstart"]


def right_answer(scene: list[Item], question: str) -> str | None:
    """An independent reading of a question; None when the scene leaves it open."""
    number = re.search(r"\d", question)
    colour = next((name for name in COLOUR_NAMES if name in question), None)

    def only(found: list[Item]) -> Item | None:
        return found[0] if len(found) == 1 else None

    edges = {
        "left-most": [i for i in scene if i.column == min(j.column for j in scene)],
        "right-most": [i for i in scene if i.column == max(j.column for j in scene)],
        "top-most": [i for i in scene if i.row == min(j.row for j in scene)],
        "bottom-most": [i for i in scene if i.row == max(j.row for j in scene)],
    }
    edge = next((name for name in edges if name in question), None)
    if question.startswith("How many"):
        return str(len(scene))
    if "largest" in question:
        return str(max(item.digit for item in scene))
    if question.startswith("Is there a"):
        return "yes" if number.group() in {str(i.digit) for i in scene} else "no"
    if edge:
        item = only(edges[edge])
        return item and (item.colour if "colour" in question else str(item.digit))
    if colour:
        item = only([i for i in scene if i.colour == colour])
        return item and str(item.digit)
    item = only([i for i in scene if str(i.digit) == number.group()])
    return item and item.colour


@pytest.mark.parametrize("name", SETS["all"])
def test_answers_are_right_and_unambiguous(name: str) -> None:
    rng = np.random.default_rng(7)
    scenes = sample_scenes(rng, 300, "val", repeats=0.5)
    asked = 0
    for index in range(300):
        scene = scene_items(scenes, index)
        dialogue = choose_kinds([name])[name](scene, rng)
        if dialogue is None:
            continue
        asked += 1
        assert dialogue.kind == name
        for question, answer in dialogue.turns:
            if dialogue.image:
                assert right_answer(scene, question) == answer, (question, scene)
            elif name == "scene_in_text":
                told, last = question.split(". ")
                colour = next(c for c in COLOUR_NAMES if c in last)
                assert re.findall(rf"{colour} (\d)", told) == [answer]
            else:
                first, second = (int(value) for value in re.findall(r"\d", question))
                larger = str(max(first, second))
                assert answer == (larger if "or" in question else ["no", "yes"][first > second])
    assert asked > 60


def test_repeated_digits_and_colours_are_left_open() -> None:
    scene = [Item(0, 0, 7, "red"), Item(1, 0, 7, "red"), Item(1, 3, 2, "blue")]
    rng = np.random.default_rng(0)
    assert choose_kinds(["leftmost"])["leftmost"](scene, rng) is None
    assert choose_kinds(["two_colours"])["two_colours"](scene, rng) is None
    for name in ("digit_of_colour", "colour_of_digit"):
        for _ in range(10):
            question, answer = choose_kinds([name])[name](scene, rng).turns[0]
            assert "red" not in question + answer


def test_digits_lie_in_cells_of_their_own() -> None:
    rng = np.random.default_rng(1)
    scenes = sample_scenes(rng, 200, "train")
    pictures, ink = draw_scenes(rng, scenes, "train")
    assert pictures.shape == (200, 96, 96, 3)
    assert pictures.dtype == np.uint8
    for index in range(200):
        cells = scenes.cell[index][scenes.cell[index] >= 0]
        assert 2 <= len(cells) <= 6
        assert len(set(cells.tolist())) == len(cells)
        inked = ink[index].reshape(4, 3, 4, 3).max((1, 3)) > 0.1
        assert set(np.nonzero(inked.ravel())[0]) == set(cells.tolist())


def test_majority_baseline_is_far_from_right(tmp_path: Path) -> None:
    written = write_dataset(tmp_path, train=400, val=200, seed=0, questions="base")
    figures = majority_accuracy(written["train"], written["val"])
    assert set(figures) == set(BASE)
    counts = Counter(sample["kind"] for sample in written["val"])
    mean = sum(figures[kind] * counts[kind] for kind in counts) / sum(counts.values())
    assert mean < 0.4
    assert all(len(answers(sample)) >= 1 for sample in written["val"])


def test_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="wheels"):
        choose_kinds("wheels")
