"""The bench of serving: requests of many users at once, dense beside pruned, in turns.

All requests come at the same moment and want short answers, so prompts are most of the work. They
go through the core that stands behind `itprune serve`, on one thread: encoding, line, ragged
prefills, joined decoding. Or, to see what HTTP adds, through the real endpoint on loopback with a
client for each.

What FLOPs promise is counted on each request alone, without padding: how the core batches them may
win or lose against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from itprune.answer import Answerer
from itprune.attach import Attached
from itprune.bench.answers import SHORT
from itprune.bench.counting import count_flops
from itprune.bench.crowd import END, PAD, build_processor, find_llava, make_crowd
from itprune.bench.front import METHOD, ask_all
from itprune.bench.record import MB, Progress, header
from itprune.bench.shapes import build_model
from itprune.bench.timing import Clock, median, use_threads
from itprune.bench.turns import take_turns
from itprune.bench.variants import Variant, eval_variants
from itprune.checkpoint import Loaded
from itprune.decoding import Decoding
from itprune.question import Question
from itprune.serving.admission import Admission, prompt_room
from itprune.serving.core import Core, Failed, Setting, Ticket
from itprune.serving.running import Asked

REQUESTS = 64
SPACE = 4 << 30
"""Bytes of keys and values."""
CALIBRATED = 16
"""Requests that a rule is fitted to."""


@dataclass
class Measured:
    """What was counted and timed of one variant."""

    flops: int = 0
    """Of all requests, each alone."""
    ran: int = 0
    """As the core ran them."""
    tokens_in: int = 0
    tokens_kept: int = 0
    """Into the LLM."""
    visual_in: int = 0
    visual_kept: float = 0.0
    """Averaged over its layers."""
    kv_bytes: int = 0
    """Most that the core held."""
    seconds: list[float] = field(default_factory=list)
    first: list[list[float]] = field(default_factory=list)
    """Seconds to the first token of each request, one list a round."""


class Through(Protocol):
    """How requests get to the model."""

    def __call__(self, loaded: Loaded, keep: float, into: Measured) -> tuple[float, list[float]]:
        """Answers all requests.

        Returns:
            Seconds from the start until all are answered, and to the first token of each.
        """


class ServeBench:
    """Model and requests shared by the variants.

    Args:
        shape: a key of `SHAPES`.
        requests: how many come at once.
        threads: CPU threads.
        new_tokens: longest answer.
        http: through the endpoint.
    """

    def __init__(
        self, shape: str, requests: int, threads: int, new_tokens: int, http: bool
    ) -> None:
        self.shape = find_llava(shape)
        self.processor = build_processor(self.shape)
        self.crowd: list[Question] = make_crowd(self.shape, requests)
        model: Any = build_model(self.shape, training=False)
        model.generation_config.update(eos_token_id=END, pad_token_id=PAD)
        self.model: nn.Module = model
        self.decoding = Decoding(max_new_tokens=new_tokens)
        self.limits = Admission(SPACE, REQUESTS, prompt_room(self.shape.device))
        self.clock = Clock(self.shape.device, threads, wall=http)
        self.through: Through = self.by_http if http else self.by_core

    # ------------------------------------------------------------------------ one round
    def by_core(self, loaded: Loaded, keep: float, into: Measured) -> tuple[float, list[float]]:
        core = Core(Answerer(loaded), self.limits)
        start = self.clock.now()
        first: dict[Ticket, float] = {}
        for question in self.crowd:
            asked = Asked(core.answerer.encode(question), self.decoding)
            core.submit(asked, Setting(METHOD, keep))
        while core.busy:
            for told in core.turn():
                if isinstance(told, Failed):
                    raise RuntimeError(told.sentence)
                first.setdefault(told.ticket, self.clock.now() - start)
            into.kv_bytes = max(into.kv_bytes, core.kv_bytes)
        seconds = self.clock.now() - start
        core.close()
        return seconds, list(first.values())

    def by_http(self, loaded: Loaded, keep: float, into: Measured) -> tuple[float, list[float]]:
        return ask_all(loaded, keep, self.crowd, self.decoding.max_new_tokens, self.limits)

    def each_alone(self, loaded: Loaded, into: Measured) -> None:
        """One request after the other."""
        answerer = Answerer(loaded, self.decoding)
        for question in self.crowd:
            (answer,) = answerer([question])
            into.tokens_in += answer.tokens_in
            into.tokens_kept += answer.tokens_stage1
            into.visual_in += answer.visual_in
            into.visual_kept += (answer.visual_layer_average or 0.0) * answer.visual_in

    # ------------------------------------------------------------------------ in turns
    def count(self, variant: Variant, into: Measured) -> None:
        """Calibrates, counts FLOPs and notes what is kept."""
        self._calibrate(variant)
        with variant.on(self.model) as attached:
            loaded = self._loaded(attached)
            into.flops = count_flops(lambda: self.each_alone(loaded, into))
            into.ran = count_flops(lambda: self.by_core(loaded, keep_of(variant), into))

    def _calibrate(self, variant: Variant) -> None:
        answerer = Answerer(self._loaded(None))
        shown = [question for question in self.crowd if question.images][:CALIBRATED]
        batches = [answerer.collate([answerer.encode(question)]) for question in shown]
        variant.calibrate(self.model, *batches)

    def time(self, variant: Variant, into: Measured) -> None:
        """All requests once."""
        with variant.on(self.model) as attached:
            seconds, first = self.through(self._loaded(attached), keep_of(variant), into)
        into.seconds.append(seconds)
        into.first.append(first)

    def _loaded(self, attached: Attached | None) -> Loaded:
        return Loaded(self.model, self.processor, attached)


@torch.no_grad()
def bench_serve(
    shape: str = "cpu",
    requests: int = REQUESTS,
    repeats: int = 5,
    keep: float = 0.22,
    threads: int = 1,
    new_tokens: int = SHORT,
    http: bool = False,
    progress: Progress = lambda line: None,
) -> dict[str, Any]:
    """Measures requests per second and the time to the first token.

    Args:
        shape: a key of `SHAPES`, one of the LLaVAs.
        requests: how many come at once.
        repeats: timed rounds.
        keep: target average of the pruned variants.
        threads: CPU threads.
        new_tokens: longest answer.
        http: through the real endpoint, by the wall clock, instead of its core alone.
        progress: told what happens.

    Returns:
        A JSON-able record; `rows` has one entry for each variant.

    Raises:
        ValueError: unknown shape, no LLaVA, or a machine too small for it.
    """
    with use_threads(threads):
        bench = ServeBench(shape, requests, threads, new_tokens, http)
        dense, _, *pruned, _ = eval_variants(bench.shape, keep)  # not padded, not the bare model
        variants = [dense, *pruned]
        measured = take_turns(bench, variants, Measured, repeats, progress)
        head = header("serve", shape, requests, keep, repeats, bench.clock)
    rows = [_row(name, found, measured[dense.name], requests) for name, found in measured.items()]
    pictures = [len(question.images) for question in bench.crowd]
    return {
        **head,
        "new_tokens": new_tokens,
        "http": http,
        "pictures": {str(n): pictures.count(n) for n in sorted(set(pictures))},
        "rows": rows,
    }


def keep_of(variant: Variant) -> float:
    """What its requests ask for."""
    assert variant.config is not None
    assert isinstance(variant.config.keep, float)
    return variant.config.keep


def _row(name: str, found: Measured, dense: Measured, requests: int) -> dict[str, Any]:
    seconds = median(found.seconds)
    speedup, flop_speedup = median(dense.seconds) / seconds, dense.flops / found.flops
    return {
        "variant": name,
        "seconds": seconds,
        "requests_per_s": requests / seconds,
        "speedup": speedup,
        "flop_speedup": flop_speedup,
        "of_flop_bound": speedup / flop_speedup,
        "batched_flops": found.ran / found.flops,
        "first_token_p50_s": median(_quantile(first, 0.5) for first in found.first),
        "first_token_p95_s": median(_quantile(first, 0.95) for first in found.first),
        "kv_mb": found.kv_bytes / MB,
        "visual_layer_average": found.visual_kept / max(found.visual_in, 1),
        "tokens_in": found.tokens_in / requests,
        "tokens_kept": found.tokens_kept / requests,
        "fastest_s": min(found.seconds),
        "slowest_s": max(found.seconds),
    }


def _quantile(values: Sequence[float], share: float) -> float:
    """The least value that so many do not exceed."""
    return sorted(values)[math.ceil(len(values) * share) - 1]
