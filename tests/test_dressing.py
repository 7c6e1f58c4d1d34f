"""Another pruner on a loaded model is the pruner it would have been loaded with."""

from __future__ import annotations

from pathlib import Path

import pytest

from itprune import PruneConfig, load_pretrained, save_pretrained
from itprune.answer import Answerer
from itprune.checkpoint import Loaded
from itprune.dressing import Wardrobe
from itprune.question import Question
from tests.chat_models import load, picture

QUESTION = Question.from_prompt("What colour is the square?", [picture(0)])
FIGURES = ("answer", "visual_stage1", "visual_stage2", "kv_entries")


def figures(loaded: Loaded) -> list[object]:
    answer = Answerer(loaded)([QUESTION])[0].to_dict()
    return [answer[name] for name in FIGURES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose method has trained parts."""
    path = tmp_path_factory.mktemp("trained")
    loaded = load("llava", PruneConfig("quecc", keep=None, options={"kernel": 2}))
    save_pretrained(path, loaded.model, loaded.processor, loaded.attached)
    return path


def test_a_way_through_the_wardrobe_and_back(folder: Path) -> None:
    loaded = load_pretrained(folder, device="cpu")
    own, wardrobe = figures(loaded), Wardrobe(loaded)
    wardrobe.method("uniform")
    wardrobe.keep(0.5)
    assert str(wardrobe) == "uniform at keep 0.5"
    expected = load_pretrained(folder, device="cpu", method="uniform", keep=0.5)
    assert figures(loaded) == figures(expected)
    wardrobe.dense()
    assert str(wardrobe) == "dense"
    assert figures(loaded)[1] == 16
    again = Wardrobe(load_pretrained(folder, device="cpu"))
    again.method("uniform")
    again.method("quecc")
    assert str(again) == "quecc by its own rule"
    assert figures(again.loaded) == own


def test_what_does_not_fit_leaves_the_pruner_before() -> None:
    loaded = load("llava", PruneConfig(keep=0.5))
    wardrobe, before = Wardrobe(loaded), figures(loaded)
    for name, sentence in {
        "quecc": "has trained parts and this checkpoint holds none",
        "nothing": "unknown value 'nothing'",
        "uniform+nothing": "unknown value 'nothing'",
        "": "unknown value ''",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            wardrobe.method(name)
    with pytest.raises(ValueError, match="must be a fraction"):
        wardrobe.keep(0.0)
    assert str(wardrobe) == "itprune at keep 0.5"
    assert figures(loaded) == before


def test_a_budget_out_of_reach_leaves_the_one_before() -> None:
    loaded = load("llava", PruneConfig("fastv", keep=0.5))
    wardrobe = Wardrobe(loaded)
    with pytest.raises(ValueError, match="keep"):
        wardrobe.keep(0.01)
    assert str(wardrobe) == "fastv at keep 0.5"


def test_a_model_without_a_pruner() -> None:
    loaded = load("llava", None)
    wardrobe, dense = Wardrobe(loaded), figures(loaded)
    wardrobe.dense()
    assert (str(wardrobe), loaded.attached) == ("dense", None)
    wardrobe.keep(0.25)
    assert str(wardrobe) == "itprune at keep 0.25"
    wardrobe.keep(1.0)
    assert figures(loaded) == dense
