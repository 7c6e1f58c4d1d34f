"""A running batch says what every request alone would hear, whoever comes and leaves meanwhile."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from itprune import PruneConfig
from itprune.methods import method_class, methods
from itprune.serving import joining
from itprune.serving.running import Asked, Batch
from tests.family_models import NAMES
from tests.serving.rows import PROMPTS, STYLES, Asking, Watched

METHODS = [name for name in methods() if method_class(name).__module__.startswith("itprune.")]
NEAR = 1e-5
every_family = pytest.mark.parametrize("name", NAMES)


@functools.cache
def asking(name: str) -> Asking:
    return Asking(name)


@contextmanager
def watched(name: str) -> Iterator[Watched]:
    batch = Watched(asking(name))
    try:
        yield batch
    finally:
        batch.batch.close()


def check(batch: Watched) -> None:
    """Every row said what its question alone is answered, as far as it came."""
    for row, said in batch.tokens.items():
        style, asked = batch.of[row]
        prompt = next(n for n in range(len(PROMPTS)) if batch.asking.encoded(n) is asked.encoded)
        most = asked.decoding.max_new_tokens
        wanted, logits = batch.asking.alone(style, prompt, most)
        assert said == wanted[: len(said)]
        for mine, alone in zip(batch.logits[row], logits, strict=False):
            torch.testing.assert_close(mine, alone, atol=NEAR, rtol=NEAR)
        if row.finish is not None:
            assert len(said) == len(wanted)


# ------------------------------------------------------------------------------ equal answers
Happening = tuple[str, int, list[int], int]
"""What happens: add, step or cancel; which pruner; which prompts; how long, or which row."""
HAPPENINGS = st.lists(
    st.tuples(
        st.sampled_from(("add", "add", "step", "step", "step", "cancel")),
        st.integers(0, len(STYLES) - 1),
        st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=3),
        st.integers(1, 7),
    ),
    min_size=4,
    max_size=14,
)


@every_family
@settings(max_examples=8, deadline=None, derandomize=True)
@given(happenings=HAPPENINGS)
def test_answers_are_those_given_alone(name: str, happenings: list[Happening]) -> None:
    with watched(name) as batch:
        for what, style, prompts, number in happenings:
            play(batch, what, style, prompts, number)
        to_the_end(batch)
        check(batch)
        assert batch.batch.kv_bytes == 0


def to_the_end(batch: Watched) -> None:
    while batch.batch.rows:
        batch.step()


def play(batch: Watched, what: str, style: int, prompts: list[int], number: int) -> None:
    styles, rows = batch.asking.styles, batch.batch.rows
    worn = styles[style % len(styles)]
    if what == "add":
        batch.add(worn, [batch.asking.asked(prompt, number) for prompt in prompts])
    elif what == "step":
        batch.step(worn)
    elif rows:
        gone = rows[number % len(rows)]
        batch.batch.cancel([gone])
        assert gone not in batch.batch.rows


@every_family
def test_all_pruners_decode_side_by_side(name: str) -> None:
    with watched(name) as batch:
        for style in batch.asking.styles:
            batch.add(style, [batch.asking.asked(prompt, 6) for prompt in (0, 1, 3)])
            batch.step()
        while batch.batch.rows:
            batch.step("itprune")
        check(batch)
        assert len(batch.tokens) == 3 * len(batch.asking.styles)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_joins(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    style = f"every {method}"
    # Heads that do not treat visual tokens go on without them while they decode.
    options = {"heads": None} if method == "yopo" else {}
    monkeypatch.setitem(STYLES, style, PruneConfig(method, keep=0.5, options=options))
    with watched("llava") as batch:
        batch.add("dense", [batch.asking.asked(2, 6)])
        batch.add(style, [batch.asking.asked(prompt, 5) for prompt in (0, 3, 4)])
        assert len(batch.batch.rows) == 4
        to_the_end(batch)
        check(batch)


def test_a_method_that_works_on_while_decoding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"mode": "zero_after_softmax"}
    monkeypatch.setitem(STYLES, "blind", PruneConfig("yopo", keep=0.5, options=options))
    with watched("llava") as batch:
        batch.add("dense", [batch.asking.asked(0, 4)])
        with pytest.raises(ValueError, match=r"'yopo' spares compute while it decodes, too"):
            batch.add("blind", [batch.asking.asked(1, 4)])
        assert len(batch.batch.rows) == 1


def test_a_row_that_waits_long_grows_past_its_first_space() -> None:
    with watched("llava") as batch:
        batch.add("itprune", [batch.asking.asked(0, 80)])
        batch.step()
        batch.add("dense", [batch.asking.asked(5, 75), batch.asking.asked(3, 2)])
        to_the_end(batch)
        check(batch)


def test_windows_that_pass_over_the_prompt() -> None:
    """Gemma 3's sliding layers see 12 tokens here: prompts are forgotten while answers go on."""
    with watched("gemma3") as batch:
        batch.add("dense", [batch.asking.asked(3, 30)])
        batch.step()
        batch.add("itprune", [batch.asking.asked(0, 30), batch.asking.asked(4, 30)])
        to_the_end(batch)
        check(batch)


def test_a_layer_with_a_window_stores_no_more_of_a_prompt() -> None:
    with watched("gemma3") as batch:
        batch.add("itprune", [batch.asking.asked(2, 5)])
        (place,) = batch.batch.cache.rows
        windows = batch.batch.windows
        assert set(windows) == {None, 12}
        counts = dict(zip(windows, place.counts, strict=True))
        assert counts[12] <= 11 < counts[None]


# ------------------------------------------------------------------------------ memory
def test_memory_follows_the_rows() -> None:
    with watched("llava") as batch:
        own = batch.batch
        assert own.kv_bytes == 0
        (short,) = batch.add("dense", [batch.asking.asked(5, 9)])
        one = own.kv_bytes
        rows = [batch.add("dense", [batch.asking.asked(2, 9)])[0] for _ in range(8)]
        assert own.kv_bytes > 8 * one
        own.cancel(rows)
        assert own.rows == [short]
        assert own.kv_bytes == one  # columns that only the long rows used are gone, too
        own.cancel([short])
        assert own.kv_bytes == 0
        assert own.step() == []


def test_entries_are_those_of_the_rows_alone() -> None:
    with watched("llava") as batch:
        batch.add("layers", [batch.asking.asked(prompt, 4) for prompt in (0, 2)])
        batch.add("dense", [batch.asking.asked(3, 4)])
        costs = [row.cost.kv_entries for row in batch.batch.rows if row.cost]
        assert batch.batch.cache.entries == sum(costs)
        batch.step()
        depth = len(batch.batch.windows)
        assert batch.batch.cache.entries == sum(costs) + 3 * depth


def test_pruned_rows_take_less_space() -> None:
    sizes = {}
    for style in ("dense", "itprune"):
        with watched("llava_next") as batch:
            batch.add(style, [batch.asking.asked(2, 4)] * 4)
            sizes[style] = batch.batch.kv_bytes
    assert sizes["itprune"] < sizes["dense"]


# ------------------------------------------------------------------------------ single rows
def test_cancelled_rows_say_no_more_and_change_no_other() -> None:
    with watched("qwen2_5_vl") as batch:
        rows = batch.add("itprune", [batch.asking.asked(prompt, 8) for prompt in (0, 1, 3, 4)])
        batch.step()
        batch.batch.cancel([rows[0], rows[2]])
        batch.batch.cancel([rows[0]])  # twice is once
        while batch.batch.rows:
            assert {event.row for event in batch.step()} <= {rows[1], rows[3]}
        assert [len(batch.tokens[row]) for row in rows] == [2, 8, 2, 8]
        check(batch)


def test_an_answer_of_one_token_joins_nobody() -> None:
    with watched("llava") as batch:
        (row,) = batch.add("itprune", [batch.asking.asked(0, 1)])
        assert row.finish == "length"
        assert batch.batch.rows == []
        assert batch.batch.kv_bytes == 0


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_each_row_draws_as_it_would_alone(top_p: float) -> None:
    ways = ({"temperature": 0.7, "top_p": top_p, "seed": 1}, {"temperature": 1.3}, {})
    with watched("llava") as batch:
        ask = batch.asking
        asked = [(prompt, ways[prompt % 3]) for prompt in range(4)]
        rows = batch.add("itprune", [ask.asked(prompt, 7, **way) for prompt, way in asked[:2]])
        batch.step()
        rows += batch.add("itprune", [ask.asked(prompt, 7, **way) for prompt, way in asked[2:]])
        while batch.batch.rows:
            batch.step()
        for row, (prompt, way) in zip(rows, asked, strict=True):
            assert batch.tokens[row] == ask.alone("itprune", prompt, 7, **way)[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"suppress_tokens": [7, 8, 9]},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"exponential_decay_length_penalty": (3, 1.5)},  # counts from the prompt's end
        {"forced_eos_token_id": 1},  # at the end of the longest answer
        {"encoder_repetition_penalty": 1.5},  # of the prompt's tokens
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_the_model_itself_does_to_scores_is_done(settings: dict) -> None:
    own = Asking("llava")
    for key, value in settings.items():
        setattr(own.model.generation_config, key, value)
    batch = Watched(own)
    rows = batch.add("dense", [own.asked(prompt, 9) for prompt in (0, 3)])
    while batch.batch.rows:
        batch.step()
    for row, prompt in zip(rows, (0, 3), strict=True):
        assert batch.tokens[row] == own.alone("dense", prompt, 9)[0]
    plain = asking("llava").alone("dense", 0, 9)[0]
    assert batch.tokens[rows[0]] != plain or "suppress_tokens" in settings


# ------------------------------------------------------------------------------ what fails
def test_a_batch_that_cannot_be_made_changes_nothing() -> None:
    with watched("llava") as batch:
        (row,) = batch.add("dense", [batch.asking.asked(0, 6)])
        whole = batch.asking.encoded(0)
        inputs = {**whole.inputs, "pixel_values": whole.inputs["pixel_values"][:0]}
        with pytest.raises((ValueError, RuntimeError)):  # the host's own words
            batch.batch.add([Asked(replace(whole, inputs=inputs), row.decoding)])
        assert batch.batch.rows == [row]
        to_the_end(batch)
        check(batch)


def test_a_failed_step_can_be_repeated() -> None:
    with watched("llava") as batch:
        batch.add("layers", [batch.asking.asked(prompt, 6) for prompt in (0, 3)])
        batch.step()

        def fail(*args: object) -> None:
            raise torch.OutOfMemoryError("no memory")

        handle = batch.asking.model.get_decoder().layers[3].register_forward_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            batch.batch.step()
        handle.remove()
        to_the_end(batch)
        check(batch)


@pytest.mark.parametrize("copies", range(1, 8))
def test_space_that_cannot_be_had_is_asked_for_again(
    copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory ends in the middle of a layer, or between two of them."""
    with watched("gemma3") as batch, monkeypatch.context() as patch:
        batch.add("dense", [batch.asking.asked(prompt, 40) for prompt in (0, 3)])
        left = copies

        def tight(*args: Any) -> Tensor:
            nonlocal left
            left -= 1
            if left < 0:
                raise torch.OutOfMemoryError("no memory")
            return resized(*args)

        resized = joining._resized
        patch.setattr(joining, "_resized", tight)
        with pytest.raises(torch.OutOfMemoryError):
            to_the_end(batch)
        left = 1000
        to_the_end(batch)
        check(batch)


def test_rows_leave_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Space is given back by copying what stays, and there is none for the copy."""

    def full(*args: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    with watched("gemma3") as batch:
        rows = batch.add("itprune", [batch.asking.asked(p, 6) for p in (2, 0, 3, 1, 4, 5)])
        batch.step()
        with monkeypatch.context() as patch:
            patch.setattr(joining, "_resized", full)
            batch.batch.cancel([rows[0], rows[2], rows[1], rows[4]])
        assert set(batch.batch.rows) == {rows[3], rows[5]}
        to_the_end(batch)
        check(batch)
        assert batch.batch.kv_bytes == 0


def test_closing_gives_the_model_back() -> None:
    own = Asking("llava")
    layers = own.model.get_decoder().layers
    batch = Batch(own.answerer)
    batch.add([own.asked(0, 6)])
    batch.close()
    assert batch.kv_bytes == 0
    assert not any(layer._forward_pre_hooks for layer in layers)
