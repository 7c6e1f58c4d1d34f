"""A dialogue on a continued cache says what a dialogue says that is run from its first token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from itprune import PruneConfig
from itprune.answer import Answerer, TooLong
from itprune.checkpoint import Loaded
from itprune.continuing import FORGOTTEN, RELAID, REWRITTEN, SPARED
from itprune.conversation import UNFINISHED, Conversation
from itprune.decoding import Decoding
from itprune.inputs import PER_TOKEN
from itprune.question import Question
from tests.chat_models import NAMES, load, make_processor, picture
from tests.oracle import drops_of, masked, recorded_rows

SHORT = Decoding(max_new_tokens=6)
HASH = PruneConfig("hash_choice", keep=0.5)
Asked = tuple[str, Sequence[int]]
"""A question and the seeds of its pictures."""
PICTURE_FIRST: tuple[Asked, ...] = (
    ("What colour is the square?", [0]),
    ("Which shape is on the left?", []),
    ("green blue?", [1]),
)
TEXT_FIRST: tuple[Asked, ...] = (
    ("Which shape is on the left?", []),
    ("green <image> blue <image> ?", [0, 1]),
    ("yellow", []),
)
DIALOGUES = {"picture first": PICTURE_FIRST, "text first": TEXT_FIRST}


def pictures(seeds: Sequence[int]) -> list[Image.Image]:
    return [picture(seed) for seed in seeds]


def say(talk: Conversation, asked: Asked) -> str:
    text, seeds = asked
    return "".join(talk.ask(text, pictures(seeds)))


def question(talk: Conversation, asked: Asked) -> Question:
    """The whole dialogue with one more question."""
    added = Question.from_prompt(asked[0], pictures(asked[1]))
    return Question((*talk.messages, *added.messages), (*talk.images, *added.images))


# ----------------------------------------------------------------------------------- the oracle
class Dropped:
    """What each layer runs without, put together from the turns of one cache."""

    def __init__(self, depth: int) -> None:
        self.layers = [torch.zeros(1, 0, dtype=torch.bool)] * depth

    def add(self, found: dict[str, list], known: int, length: int) -> list[Tensor]:
        """One more turn.

        Args:
            found: rows of its prompt; empty where nothing was chosen.
            known: tokens before it that stay in the cache.
            length: of the whole dialogue.
        """
        new = drops_of(found) if found else [None] * len(self.layers)
        out = []
        for old, now in zip(self.layers, new, strict=True):
            gone = torch.zeros(1, length, dtype=torch.bool)
            width = min(known, old.shape[1])
            gone[:, :width] = old[:, :width]
            if now is not None:
                gone[:, known:] = now
            out.append(gone)
        self.layers = out
        return out


@torch.no_grad()
def loop(loaded: Loaded, inputs: dict[str, Tensor], steps: int) -> tuple[Tensor, list[int]]:
    """Logits of the first token, and the tokens of a greedy answer, without any cache."""
    data = {key: value[None] if key in PER_TOKEN else value for key, value in inputs.items()}
    first, said = None, []
    for _ in range(steps):
        logits = loaded.model(**data, use_cache=False).logits[0, -1]
        first = logits.clone() if first is None else first
        logits[loaded.processor.image_token_id] = -torch.inf
        said.append(int(logits.argmax()))
        if said[-1] == loaded.processor.tokenizer.eos_token_id:
            break
        for key in PER_TOKEN.keys() & data.keys():
            token = {"input_ids": said[-1], "attention_mask": 1}.get(key, 0)
            more = torch.full((1, 1), token, dtype=data[key].dtype)
            data[key] = torch.cat([data[key], more], 1)
    assert first is not None
    return first, said


@contextmanager
def first_logits(model: Any) -> Iterator[list[Tensor]]:
    """Collects the logits of every forward's last token."""
    found: list[Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda m, a, out: found.append(out[0, -1].detach()))
    try:
        yield found
    finally:
        handle.remove()


@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize("config", [None, HASH], ids=["dense", "pruned"])
@pytest.mark.parametrize("name", NAMES)
def test_a_continued_dialogue_equals_one_run_anew(
    name: str, config: PruneConfig | None, dialogue: str
) -> None:
    """With what was dropped hidden from the bare model, turn by turn, new pictures included."""
    loaded, bare = load(name, config), load(name, None)
    talk, answerer = Conversation(loaded, SHORT), Answerer(bare, SHORT)
    dropped = Dropped(len(bare.model.get_decoder().layers))
    continued = []
    for asked in DIALOGUES[dialogue]:
        encoded = answerer.encode(question(talk, asked))
        with recorded_rows(loaded.model) as found, first_logits(loaded.model) as logits:
            answer = say(talk, asked)
        turn = talk.turn
        assert turn.tokens_new + turn.tokens_cached == encoded.length
        with masked(bare.model, dropped.add(found, turn.tokens_cached, encoded.length)):
            expected, tokens = loop(bare, encoded.inputs, 6)
        assert (logits[0] - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()) / 5)
        text = bare.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        assert answer == turn.answer == text.strip()
        continued.append(turn.tokens_cached > 0)
        assert (turn.recomputed == "") == continued[-1] or len(continued) == 1
    assert not continued[0]
    assert all(continued[1:]) or name == "gemma3"  # its window is 24 tokens


@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_dialogue_about_one_picture_equals_the_answerer(name: str) -> None:
    """The first question decides what is kept, in both."""
    config = PruneConfig(keep=None)
    talk, answerer = Conversation(load(name, config), SHORT), Answerer(load(name, config), SHORT)
    for asked in (PICTURE_FIRST[0], PICTURE_FIRST[1], ("yellow", [])):
        whole = answerer([question(talk, asked)])[0]
        assert say(talk, asked) == whole.answer
        turn = talk.turn
        kept = (turn.visual_in, turn.visual_stage1, turn.visual_stage2, turn.visual_layer_average)
        assert kept == (
            whole.visual_in,
            whole.visual_stage1,
            whole.visual_stage2,
            whole.visual_layer_average,
        )
        assert turn.finish == whole.finish
    assert turn.tokens_cached > turn.tokens_new


def test_a_turn_runs_its_own_tokens_only() -> None:
    loaded = load("llava", HASH)
    talk, rows = Conversation(loaded, SHORT), []
    layer = loaded.model.get_decoder().layers[0]
    layer.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[-2]))
    say(talk, PICTURE_FIRST[0])
    rows.clear()
    say(talk, PICTURE_FIRST[1])
    assert rows[0] == talk.turn.tokens_new
    assert rows[1:] == [1] * (talk.turn.tokens_out - 1)


def test_figures_count_the_whole_dialogue() -> None:
    loaded = load("llava", HASH)
    talk = Conversation(loaded, SHORT)
    turns = []
    for asked in PICTURE_FIRST:
        say(talk, asked)
        turns.append(talk.turn)
    first, second, third = turns
    assert (first.visual_in, third.visual_in) == (16, 32)
    assert first.visual_stage1 == second.visual_stage1 < third.visual_stage1 < 32
    assert first.kv_entries < second.kv_entries < third.kv_entries
    held = talk._held.cache.layers
    assert third.kv_entries == sum(int(layer.entries()[0]) for layer in held)
    assert third.kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in held)
    assert 0 < third.first_token_s <= third.total_s
    assert third.to_dict()["tokens_cached"] == third.tokens_cached


def test_sampling_is_that_of_the_answerer() -> None:
    decoding = Decoding(max_new_tokens=6, temperature=1.0, seed=3)
    talk, answerer = (
        Conversation(load("llava", None), decoding),
        Answerer(load("llava", None), decoding),
    )
    for asked in PICTURE_FIRST:
        assert answerer([question(talk, asked)])[0].answer == say(talk, asked)


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
