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
from itprune.answer import Answerer
from itprune.checkpoint import Loaded
from itprune.conversation import Conversation
from itprune.decoding import Decoding
from itprune.inputs import PER_TOKEN
from itprune.methods import method_class, methods
from itprune.question import Question
from tests.chat_models import NAMES, load, picture
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
METHODS = [name for name in methods() if method_class(name).__module__.startswith("itprune.")]
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


@pytest.mark.parametrize("method", [*METHODS, "visionzip+pyramiddrop"])
def test_every_method_goes_on(method: str) -> None:
    """Weights of trained parts are drawn, and tokens renumbered, the same in both."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(load("llava", PruneConfig(method, keep=0.5)))
    talk, answerer = Conversation(made[0], SHORT), Answerer(made[1], SHORT)
    for asked in (PICTURE_FIRST[0], PICTURE_FIRST[1], ("yellow", [])):
        whole = answerer([question(talk, asked)])[0]
        assert say(talk, asked) == whole.answer
        assert talk.turn.visual_stage2 == whole.visual_stage2
    assert talk.turn.recomputed == ""


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
