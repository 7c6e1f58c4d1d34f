"""The bench of evaluation: answers per second through `generate`, in turns.

What `itprune eval` does with a batch: tower, projector, prefill of padded prompts and some greedy
steps. Every row gets the same number of new tokens, so that variants differ by their tokens alone.
Benchmarks ask several questions about a picture; the dense model sees it once a batch, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from itprune.attach import base_model
from itprune.bench.counting import count_flops
from itprune.bench.record import Progress, header, tokens_of
from itprune.bench.shape import FIRST_ID, Shape
from itprune.bench.shapes import build_model, find_shape, make_batch
from itprune.bench.timing import Clock, median, use_threads
from itprune.bench.turns import take_turns
from itprune.bench.variants import Variant, eval_variants
from itprune.report import Report

SHORT = 4
"""New tokens of a row: benchmarks ask for a word or a letter."""


@dataclass(frozen=True)
class Load:
    """What is answered at once."""

    batch: int
    questions: int
    """About each picture."""
    new_tokens: int

    def prompt(self, shape: Shape) -> dict[str, Tensor]:
        """A batch with every picture before its own questions.

        Raises:
            ValueError: the shape's pictures cannot be told apart.
        """
        prompt = make_batch(shape, self.batch, labels=False)
        if self.questions == 1:
            return prompt
        pixels = prompt["pixel_values"]
        if len(pixels) != self.batch:
            raise ValueError(
                "--questions: the tower of this shape takes all pictures in one sequence, so it "
                "sees each as often as it is asked about; leave --questions out"
            )
        picture = torch.arange(self.batch, device=pixels.device) // self.questions
        return {**prompt, "pixel_values": pixels[picture]}


@dataclass
class Measured:
    """What was noted and timed of one variant."""

    flops: int = 0
    report: Report | None = None
    seconds: list[float] = field(default_factory=list)


class AnswersBench:
    """Model and prompts shared by the variants."""

    def __init__(self, model: Any, shape: Shape, load: Load, threads: int) -> None:
        self.model, self.shape, self.new = model, shape, load.new_tokens
        self.prompt = load.prompt(shape)
        self.clock = Clock(shape.device, threads)

    def answer(self) -> None:
        """Greedy answers of `new` tokens to all rows."""
        base_model(self.model).generate(
            **self.prompt,
            generation_config=GenerationConfig(
                max_new_tokens=self.new,
                min_new_tokens=self.new,
                do_sample=False,
                use_cache=True,
                eos_token_id=FIRST_ID,
                pad_token_id=FIRST_ID,
            ),
        )

    def count(self, variant: Variant, into: Measured) -> None:
        """Calibrates, counts FLOPs and notes what is kept."""
        variant.calibrate(self.model, self.prompt)
        with variant.on(self.model) as attached:
            into.flops = count_flops(self.answer)
            into.report = attached.report if attached is not None else None

    def time(self, variant: Variant, into: Measured) -> None:
        """One batch of answers."""
        with variant.on(self.model):
            self.clock.restart()
            self.answer()
            into.seconds.append(self.clock.lap())


@torch.no_grad()
def bench_eval(
    shape: str = "cpu",
    batch: int | None = None,
    repeats: int = 5,
    keep: float = 0.22,
    threads: int = 1,
    new_tokens: int = SHORT,
    questions: int = 1,
    progress: Progress = lambda line: None,
) -> dict[str, Any]:
    """Measures answers per second.

    Args:
        shape: a key of `SHAPES`.
        batch: questions answered together; None: the shape's number.
        repeats: timed rounds.
        keep: target average of the pruned variants.
        threads: CPU threads.
        new_tokens: tokens of an answer.
        questions: about each picture; those of a batch share one pass through the tower.
        progress: told what happens.

    Returns:
        A JSON-able record; `rows` has one entry for each variant.

    Raises:
        ValueError: unknown shape, a machine too small for it, or one that cannot share pictures.
    """
    size = find_shape(shape)
    load = Load(batch or size.batch, questions, new_tokens)
    variants = eval_variants(size, keep)
    with use_threads(threads):
        bench = AnswersBench(build_model(size, training=False), size, load, threads)
        measured = take_turns(bench, variants, Measured, repeats, progress)
        head = header("eval", shape, load.batch, keep, repeats, bench.clock)
    dense = measured[variants[0].name]
    rows = [_row(name, found, dense, size, load.batch) for name, found in measured.items()]
    return {**head, "new_tokens": new_tokens, "questions": questions, "rows": rows}


def _row(name: str, found: Measured, dense: Measured, shape: Shape, batch: int) -> dict[str, Any]:
    seconds = median(found.seconds)
    speedup, flop_speedup = median(dense.seconds) / seconds, dense.flops / found.flops
    return {
        "variant": name,
        "batch": batch,
        "seconds": seconds,
        "answers_per_s": batch / seconds,
        "speedup": speedup,
        "flop_speedup": flop_speedup,
        "of_flop_bound": speedup / flop_speedup,
        "fastest_s": min(found.seconds),
        "slowest_s": max(found.seconds),
        **tokens_of(found.report, shape, batch),
    }
