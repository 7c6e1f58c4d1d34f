"""Sessions on models of several families: answers, pieces, and where their patches stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from itprune import load_pretrained
from itprune.answer import Answerer
from itprune.app.limits import Limits
from itprune.app.session import Ask, Session
from itprune.app.streaming import Stopped
from itprune.calibration import Calibration
from itprune.decoding import Decoding
from itprune.question import Question
from itprune.web.pictures import read_picture
from tests.app.asking import png
from tests.tiny_folders import build_folder

FAMILIES = ("qwen2_5_vl", "llava_next", "internvl", "idefics3", "gemma3", "paligemma")
TOKENS = 12


def told_by(session: Session, method: str, keep: float) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    ask = Ask(png((120, 80)), "What is red?", method, keep, TOKENS, beside=True)
    session.check(ask)
    session.answer(ask, told.append, lambda: False)
    return told


def text_of(told: list[dict[str, Any]], column: str) -> str:
    return "".join(e["text"] for e in told if e["kind"] == "text" and e["column"] == column)


def check_kept(told: list[dict[str, Any]]) -> None:
    (kept,) = [event for event in told if event["kind"] == "kept"]
    for stage in kept["stages"]:
        for grid, mask in zip(kept["grids"], stage["masks"], strict=True):
            assert len(mask) == grid["rows"] * grid["columns"]
    for grid in kept["grids"]:
        left, top, right, bottom = grid["box"]
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1
    first = kept["stages"][0]
    assert 0 < first["kept"] < first["of"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_family_can_be_asked(family: str, tmp_path: Path) -> None:
    session = Session(load_pretrained(build_folder(family, tmp_path)), family, Limits())
    told = told_by(session, "random", 0.4)
    check_kept(told)
    for column in ("pruned", "dense"):
        (done,) = [e for e in told if e["kind"] == "done" and e["column"] == column]
        assert text_of(told, column) == done["answer"]


def test_tiles_have_their_own_part_of_the_picture(tmp_path: Path) -> None:
    session = Session(load_pretrained(build_folder("idefics3", tmp_path)), "tiles", Limits())
    (kept,) = [event for event in told_by(session, "random", 0.4) if event["kind"] == "kept"]
    boxes = [tuple(grid["box"]) for grid in kept["grids"]]
    assert len(set(boxes)) == len(boxes) > 1
    assert boxes[-1] == pytest.approx((0, 0, 1, 1), abs=0.02)  # the overview stands last


def test_pieces_join_to_the_answer_of_infer(tiny_llava_folder: Path) -> None:
    session = Session(load_pretrained(tiny_llava_folder), "random weights", Limits())
    told = told_by(session, "itprune", 0.5)
    answerer = Answerer(load_pretrained(tiny_llava_folder, keep=0.5), Decoding(TOKENS))
    picture = read_picture(png((120, 80)), 10**6)
    answer = answerer([Question.from_prompt("What is red?", [picture])])[0]
    assert text_of(told, "pruned") == answer.answer
    assert answer.tokens_out > 1


def test_who_leaves_between_tokens_is_not_written_to(tiny_llava_folder: Path) -> None:
    session = Session(load_pretrained(tiny_llava_folder), "random weights", Limits())
    told: list[dict[str, Any]] = []
    ask = Ask(png(), "What is red?", "itprune", 0.5, TOKENS, beside=True)
    with pytest.raises(Stopped):
        session.answer(ask, told.append, lambda: any(e["kind"] == "kept" for e in told))
    assert not [event for event in told if event["kind"] == "done"]
    told_by(session, "random", 0.5)  # the pruner was taken off, and the next one fits


def test_a_session_starts_with_what_the_checkpoint_says() -> None:
    from tests.app.conftest import BUNDLED

    loaded = load_pretrained(BUNDLED, keep=0.5, method="visionzip")
    facts = Session(loaded, "tiny", Limits()).facts()
    assert (facts["method"], facts["keep"]) == ("visionzip", 0.5)
    assert facts["methods"][0]["name"] == "visionzip"
    own = load_pretrained(BUNDLED, method="itprune")
    assert own.attached is not None
    own.attached.calibration = Calibration()
    assert Session(own, "tiny", Limits()).facts()["methods"][0]["note"] == ""
    dense = Session(load_pretrained(BUNDLED, method="dense"), "tiny", Limits()).facts()
    assert dense["method"] == "itprune"


def test_a_method_that_reads_patches_is_offered_where_tokens_are_patches(tmp_path: Path) -> None:
    session = Session(load_pretrained(build_folder("gemma3", tmp_path)), "g", Limits())
    assert "visionzip" not in session.offered
    assert "random" in session.offered


def test_limits_let_something_through() -> None:
    with pytest.raises(ValueError, match="waiting: must be above 0"):
        Limits(waiting=0)
    with pytest.raises(ValueError, match="body_mb"):
        Limits(body_mb=float("nan"))
