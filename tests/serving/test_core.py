"""The line before the running batch: who joins when, what is refused, and what fails alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from itprune.answer import Answerer
from itprune.decoding import Decoding
from itprune.dressing import Wardrobe
from itprune.question import Question
from itprune.serving.admission import Admission, Ledger, Need, spare_bytes
from itprune.serving.core import FAILED, NO_MEMORY, Core, Failed, Setting, Ticket, Told
from itprune.serving.running import Asked
from tests.chat_models import load, picture

GB = 10**9
DENSE = Setting("itprune", 1.0)
HALF = Setting("itprune", 0.5)
FAST = Setting("fastv", 0.5)
TEXTS = ("What colour is the square?", "Which shape is on the left?", "green blue yellow", "0 1 2")


@functools.cache
def answerer() -> Answerer:
    return Answerer(load("llava", None), Decoding(max_new_tokens=8))


def asked(number: int, tokens: int = 8, stop: Sequence[str] = ()) -> Asked:
    pictures = [picture(number)] if number % 2 == 0 else []
    question = Question.from_prompt(TEXTS[number % len(TEXTS)], pictures)
    return Asked(answerer().encode(question), Decoding(max_new_tokens=tokens), tuple(stop))


@functools.cache
def alone(number: int, setting: Setting) -> str:
    """What the model says when it is asked nothing else."""
    wardrobe = Wardrobe(answerer().loaded)
    wardrobe.method(setting.method, setting.keep)
    return answerer().answer([asked(number).encoded])[0].answer


@pytest.fixture
def core() -> Iterator[Core]:
    made = Core(answerer(), Admission(kv_bytes=GB))
    yield made
    made.close()


def drain(core: Core) -> list[Told | Failed]:
    told = []
    while core.busy:
        told += core.turn()
    return told


def said(told: Sequence[Told | Failed], ticket: Ticket) -> str:
    return "".join(t.event.text for t in told if isinstance(t, Told) and t.ticket is ticket)


def limited(**limits: int) -> Core:
    return Core(answerer(), Admission(**{"kv_bytes": GB, **limits}))


# ------------------------------------------------------------------------------ answers
def test_requests_of_all_settings_are_answered_as_if_alone() -> None:
    wanted = [(number, setting) for number in range(4) for setting in (DENSE, HALF, FAST)]
    expected = [alone(number, setting) for number, setting in wanted]
    core = limited()
    tickets = [core.submit(asked(number), setting) for number, setting in wanted]
    assert core.waiting == 12
    told = drain(core)
    assert [said(told, ticket) for ticket in tickets] == expected
    ends = [t.event.finish for t in told if isinstance(t, Told) and t.event.finish]
    assert len(ends) == 12
    assert (core.waiting, core.running, core.kv_bytes) == (0, 0, 0)
    core.close()


def test_one_prefill_takes_those_of_the_first_ones_setting(core: Core) -> None:
    tickets = [core.submit(asked(n), setting) for n, setting in enumerate((HALF, FAST, HALF))]
    first = {t.ticket for t in core.turn() if isinstance(t, Told)}
    assert first == {tickets[0], tickets[2]}
    assert {t.ticket for t in core.turn() if isinstance(t, Told)} == set(tickets)


def test_a_request_tells_what_it_costs(core: Core) -> None:
    core.submit(asked(0), HALF)
    (event, *_) = [t.event for t in core.turn() if isinstance(t, Told)]
    cost = event.row.cost
    assert cost is not None
    assert cost.tokens_kept < cost.tokens_in
    assert cost.visual_kept < cost.visual_in == 16


# ------------------------------------------------------------------------------ admission
def test_rows_beyond_the_limit_wait() -> None:
    core = limited(rows=2)
    for number in range(5):
        core.submit(asked(number), HALF)
    most = 0
    while core.busy:
        core.turn()
        most = max(most, core.running)
    assert most == 2
    core.close()


def test_bytes_stay_below_their_limit_and_nobody_is_lost() -> None:
    need = Need.of(40, 16, 0.5, 30)
    ledger = Ledger(answerer().text_config, torch.float32, Admission(kv_bytes=GB))
    one = ledger.bytes(1, [need.width(None)] * len(ledger.windows))
    core = limited(kv_bytes=3 * one)
    tickets = [core.submit(asked(number, 20), HALF) for number in range(8)]
    told, most = [], 0
    while core.busy:
        told += core.turn()
        assert core.kv_bytes <= 3 * one
        most = max(most, core.running)
    assert 1 < most < 8
    assert all(said(told, ticket) for ticket in tickets)
    core.close()


def test_what_can_never_fit_is_refused_at_once() -> None:
    core = limited(kv_bytes=40_000)
    with pytest.raises(ValueError, match=r"^the request may need .* but .* is the limit; ask for"):
        core.submit(asked(0, 400), HALF)
    assert not core.busy
    core.close()


def test_many_prompts_are_run_in_several_goes() -> None:
    core = limited(prompt_tokens=30)
    for _ in range(3):
        core.submit(asked(0), HALF)
    core.turn()
    assert core.running == 1
    core.turn()
    assert core.running == 2
    core.close()


def test_a_prompt_longer_than_a_go_is_run_all_the_same() -> None:
    core = limited(prompt_tokens=2)
    tickets = [core.submit(asked(number), HALF) for number in (0, 1)]
    told = drain(core)
    assert [said(told, ticket) for ticket in tickets] == [alone(number, HALF) for number in (0, 1)]
    core.close()


def test_who_is_first_in_line_is_not_passed_by() -> None:
    ledger = Ledger(answerer().text_config, torch.float32, Admission(kv_bytes=GB))
    other = limited()
    need = other.submit(asked(0, 300), HALF).need
    other.close()
    core = limited(kv_bytes=ledger.bytes(1, [need.width(None)] * len(ledger.windows)))
    running = core.submit(asked(1), HALF)
    first, second = core.submit(asked(0, 300), HALF), core.submit(asked(1), HALF)
    told = core.turn()
    assert {one.ticket for one in told} == {running}
    assert (core.running, core.waiting) == (1, 2)
    told = drain(core)
    order = list(dict.fromkeys(one.ticket for one in told))
    assert order == [running, first, second]
    core.close()


def test_a_window_needs_no_more_than_itself() -> None:
    need = Need.of(1000, 900, 0.1, 20)
    assert need.width(None) == 100 + 90 + 20
    assert need.width(64) == 63 + 20


@pytest.mark.parametrize("name", ["kv_bytes", "rows", "prompt_tokens"])
def test_limits_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: must be at least 1, got 0"):
        Admission(**{"kv_bytes": 1, name: 0})


def test_the_machine_has_bytes_to_spare() -> None:
    assert spare_bytes(torch.device("cpu")) > 0


# ------------------------------------------------------------------------------ leaving, failing
def test_cancelled_requests_leave_line_and_batch() -> None:
    core = limited(rows=2)
    tickets = [core.submit(asked(number), HALF) for number in range(4)]
    core.turn()
    core.cancel(tickets[0])
    core.cancel(tickets[3])
    core.cancel(tickets[0])
    assert (core.running, core.waiting) == (1, 1)
    ended = {t.ticket for t in drain(core) if isinstance(t, Told) and t.event.finish}
    assert ended == {tickets[1], tickets[2]}
    core.close()


def test_a_broken_request_fails_alone(core: Core) -> None:
    good = [core.submit(asked(number), HALF) for number in (0, 1)]
    whole = asked(2)
    inputs = {**whole.encoded.inputs, "pixel_values": torch.zeros(1, 3, 1, 1)}
    bad = core.submit(Asked(replace(whole.encoded, inputs=inputs), whole.decoding), HALF)
    told = drain(core)
    assert [t.ticket for t in told if isinstance(t, Failed)] == [bad]
    assert [said(told, ticket) for ticket in good] == [alone(number, HALF) for number in (0, 1)]
    assert not core._tickets


def test_a_method_that_does_not_fit_fails_with_its_sentence(core: Core) -> None:
    wrong = core.submit(asked(0), Setting("quecc", 0.5))
    right = core.submit(asked(1), HALF)
    told = drain(core)
    failed = [t for t in told if isinstance(t, Failed)]
    assert [t.ticket for t in failed] == [wrong]
    assert "has trained parts" in failed[0].sentence
    assert said(told, right) == alone(1, HALF)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError("no memory"), NO_MEMORY),
        (RuntimeError("/secret/path"), FAILED),
        (ValueError(), FAILED),
        (ValueError("one line\nanother"), "one line"),
    ],
)
def test_a_pruner_that_cannot_be_put_on_fails_its_requests_alone(
    core: Core, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    def broken(*args: object) -> None:
        raise error

    core.submit(asked(0), HALF)
    core.turn()
    with monkeypatch.context() as patch:
        patch.setattr(Wardrobe, "method", broken)
        second = core.submit(asked(0), FAST)
        told = core.turn()
    assert Failed(second, sentence) in told
    assert core.running == 1
    third = core.submit(asked(0), FAST)
    told = drain(core)
    assert said(told, third) == alone(0, FAST)
    assert all(isinstance(one, Told) for one in told)
    assert not core._tickets


def test_without_memory_prompts_go_one_by_one_and_the_last_row_gives_way(core: Core) -> None:
    def tight(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("no memory")

    handle = answerer().model.register_forward_pre_hook(tight, with_kwargs=True)
    try:
        tickets = [core.submit(asked(number), HALF) for number in range(3)]
        told = drain(core)
    finally:
        handle.remove()
    failed = [t for t in told if isinstance(t, Failed)]
    assert [(t.ticket, t.sentence) for t in failed] == [(tickets[2], NO_MEMORY)]
    assert said(told, tickets[0]) == alone(0, HALF)


def test_a_bug_ends_what_runs_and_the_next_request_is_served(core: Core) -> None:
    first = core.submit(asked(0), HALF)
    core.turn()

    def broken(*args: object) -> None:
        raise RuntimeError("/secret/path")

    handle = answerer().model.get_decoder().layers[1].register_forward_hook(broken)
    told = core.turn()
    handle.remove()
    assert told == [Failed(first, FAILED)]
    second = core.submit(asked(0), HALF)
    assert said(drain(core), second) == alone(0, HALF)


# ------------------------------------------------------------------------------ stop strings
def test_a_stop_string_ends_the_answer_before_it() -> None:
    whole = alone(1, HALF)
    stop = whole[4:6]
    core = limited()
    ticket = core.submit(asked(1, stop=[stop]), HALF)
    other = core.submit(asked(3), HALF)
    told = drain(core)
    assert said(told, ticket) == whole[: whole.index(stop)].strip()
    last = [t.event for t in told if isinstance(t, Told) and t.ticket is ticket][-1]
    assert last.finish == "stop"
    assert said(told, other) == alone(3, HALF)
    core.close()
