"""When a dialogue is run from its first token, and what ends a turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from itprune import PruneConfig
from itprune.answer import Answerer, TooLong
from itprune.continuing import FORGOTTEN, RELAID, REWRITTEN, SPARED
from itprune.conversation import UNFINISHED, Conversation
from itprune.streaming import TokenStream
from tests.chat_models import load, make_processor
from tests.test_conversation import (
    HASH,
    PICTURE_FIRST,
    SHORT,
    TEXT_FIRST,
    pictures,
    question,
    say,
)


# ------------------------------------------------------------------------- when it is run again
def test_a_template_that_rewrites_history_is_run_again() -> None:
    processor = make_processor("llava")
    counted = "{{ 'turns: ' + (messages | length | string) + ' ' }}"
    processor.chat_template = counted + processor.chat_template
    talk = Conversation(load("llava", HASH, processor), SHORT)
    answerer = Answerer(load("llava", None, processor), SHORT)
    say(talk, PICTURE_FIRST[0])
    expected = answerer.encode(question(talk, PICTURE_FIRST[1])).length
    say(talk, PICTURE_FIRST[1])
    assert talk.turn.recomputed == REWRITTEN
    assert (talk.turn.tokens_new, talk.turn.tokens_cached) == (expected, 0)
    assert talk.turn.visual_in == 16


def test_a_processor_that_lays_images_out_anew_is_run_again() -> None:
    processor = make_processor("llava")
    make = processor.image_processor.preprocess

    def by_count(images: Any, *args: Any, **kwargs: Any) -> Any:
        out = make(images, *args, **kwargs)
        out["pixel_values"] = out["pixel_values"] / len(out["pixel_values"])
        return out

    processor.image_processor.preprocess = by_count
    talk = Conversation(load("llava", None, processor), SHORT)
    for asked in PICTURE_FIRST:
        say(talk, asked)
    assert talk.turn.recomputed == RELAID


def test_what_has_left_a_sliding_window_is_run_again() -> None:
    talk = Conversation(load("gemma3", HASH), SHORT)
    for asked in TEXT_FIRST[:2]:
        say(talk, asked)
    assert talk.turn.recomputed == FORGOTTEN


def test_compute_that_is_spared_meets_all_images_in_one_forward() -> None:
    talk = Conversation(load("llava", PruneConfig("yopo", keep=0.5)), SHORT)
    for asked in PICTURE_FIRST:
        say(talk, asked)
    assert talk.turn.recomputed == SPARED


def test_another_pruner_is_said_to_be_the_reason() -> None:
    loaded = load("llava", HASH)
    talk, dense = Conversation(loaded, SHORT), Answerer(load("llava", None), SHORT)
    say(talk, PICTURE_FIRST[0])
    loaded.attached.set_keep(1.0)
    talk.recompute("another keep")
    expected = dense([question(talk, PICTURE_FIRST[1])])[0].answer
    assert say(talk, PICTURE_FIRST[1]) == expected
    assert talk.turn.recomputed == "another keep"
    assert talk.turn.visual_stage2 == 16
    say(talk, PICTURE_FIRST[2])
    assert talk.turn.recomputed == ""


# ------------------------------------------------------------------------------------ the pieces
def test_an_answer_may_be_stopped_and_the_dialogue_goes_on() -> None:
    talk, answerer = Conversation(load("llava", None), SHORT), Answerer(load("llava", None), SHORT)
    pieces = talk.ask("What colour is the square?", pictures([0]))
    begun = next(pieces)
    pieces.close()
    assert talk.turn.finish == "stopped"
    assert talk.turn.answer.startswith(begun.strip())
    assert talk.messages[-1]["content"][0]["text"] == talk.turn.answer
    expected = answerer([question(talk, PICTURE_FIRST[1])])[0].answer
    assert say(talk, PICTURE_FIRST[1]) == expected
    assert talk.turn.tokens_cached > 16


def test_a_question_nobody_reads_was_not_asked() -> None:
    talk = Conversation(load("llava", None), SHORT)
    talk.ask("What colour is the square?").close()
    assert talk.messages == ()


def test_what_the_model_refuses_leaves_the_dialogue_as_it_was() -> None:
    loaded = load("llava", HASH)
    talk = Conversation(loaded, SHORT)
    say(talk, PICTURE_FIRST[0])
    before, turn = talk.messages, talk.turn

    def broken(module: Any, args: Any) -> None:
        raise ValueError("no")

    handle = loaded.model.get_decoder().layers[2].register_forward_pre_hook(broken)
    with pytest.raises(ValueError, match="no"):
        say(talk, PICTURE_FIRST[2])
    handle.remove()
    assert (talk.messages, talk.turn, len(talk.images)) == (before, turn, 1)
    say(talk, PICTURE_FIRST[1])
    assert talk.turn.recomputed == UNFINISHED


def test_a_full_context_is_one_sentence() -> None:
    talk = Conversation(load("llava", None), SHORT)
    say(talk, PICTURE_FIRST[0])
    with pytest.raises(TooLong, match="the model's context holds 512"):
        talk.ask("blue " * 600)
    assert len(talk.messages) == 2
    say(talk, PICTURE_FIRST[1])
    assert talk.turn.tokens_cached > 0


def test_reset_begins_anew() -> None:
    talk = Conversation(load("llava", HASH), SHORT)
    first = say(talk, PICTURE_FIRST[0])
    talk.reset()
    assert (talk.messages, talk.images, talk.turn) == ((), (), None)
    assert say(talk, PICTURE_FIRST[0]) == first
    assert (talk.turn.tokens_cached, talk.turn.recomputed) == (0, "")


def test_an_answer_that_spells_an_image_is_history_without_it() -> None:
    loaded = load("llava", None)
    loaded.model.generation_config.suppress_tokens = None
    talk = Conversation(loaded, SHORT)
    said = talk._without_places("a <image> b")
    assert said == "a  b"
    assert talk._without_places("a <im<image>age> b") == "a  b"
    loaded.model.get_output_embeddings().register_forward_hook(
        lambda module, args, out: out.index_fill(-1, torch.tensor(3), 99.0)
    )
    say(talk, PICTURE_FIRST[0])  # six placeholders
    say(talk, PICTURE_FIRST[1])
    assert talk.turn.recomputed == ""


def test_two_dialogues_share_a_model() -> None:
    loaded, alone = load("qwen2_5_vl", HASH), Conversation(load("qwen2_5_vl", HASH), SHORT)
    one, other = Conversation(loaded, SHORT), Conversation(loaded, SHORT)
    for asked, between in zip(PICTURE_FIRST, TEXT_FIRST, strict=True):
        assert say(one, asked) == say(alone, asked)
        say(other, between)
    assert one.turn.recomputed == ""


def impatient(*args: Any) -> Any:
    raise KeyboardInterrupt


def test_an_answer_may_be_stopped_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    talk, answerer = Conversation(load("llava", HASH), SHORT), Answerer(load("llava", HASH), SHORT)
    with monkeypatch.context() as now:
        now.setattr(TokenStream, "__iter__", impatient)
        with pytest.raises(KeyboardInterrupt):
            say(talk, PICTURE_FIRST[0])
    assert (talk.turn.answer, talk.turn.finish, talk.turn.tokens_out) == ("", "stopped", 0)
    expected = answerer([question(talk, PICTURE_FIRST[1])])[0].answer
    assert say(talk, PICTURE_FIRST[1]) == expected


def test_nobody_has_to_wait_for_a_turn_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, and again while the model is still at work: the turn is lost, the dialogue is not."""
    talk = Conversation(load("llava", HASH), SHORT)
    with monkeypatch.context() as now:
        now.setattr(TokenStream, "__iter__", impatient)
        now.setattr(TokenStream, "finish", impatient)
        with pytest.raises(KeyboardInterrupt):
            say(talk, PICTURE_FIRST[0])
    assert talk.messages == ()
    answer = say(talk, PICTURE_FIRST[0])
    assert answer == say(Conversation(load("llava", HASH), SHORT), PICTURE_FIRST[0])


def test_a_turn_under_way_is_lost_to_the_next() -> None:
    talk = Conversation(load("llava", HASH), SHORT)
    slow = talk.ask("What colour is the square?", pictures([0]))
    next(slow)
    answer = say(talk, PICTURE_FIRST[1])
    slow.close()
    assert len(talk.messages) == 2
    slow = talk.ask("yellow")
    next(slow)
    talk.reset()
    slow.close()
    assert (talk.messages, talk.turn) == ((), None)
    assert say(talk, PICTURE_FIRST[1]) == answer
