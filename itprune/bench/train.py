"""The training bench: one optimizer step of every variant, in turns, with one model.

A step is forward, backward and AdamW, as Trainer runs them. The learning rate is 0: the arithmetic
is the same and every round finds the same weights, hence the same tokens kept. FLOPs and memory are
counted in rounds of their own, which also warm up.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from itprune.bench.counting import Flops, SavedBytes, measure_flops, timed_choices
from itprune.bench.record import MB, Progress, header, tokens_of
from itprune.bench.shape import Shape
from itprune.bench.shapes import build_model, find_shape, make_batch, set_train_mode
from itprune.bench.timing import Clock, median, use_threads
from itprune.bench.turns import take_turns
from itprune.bench.variants import Variant, train_variants
from itprune.report import Report


@dataclass
class Measured:
    """What was counted and timed of one variant."""

    flops: Flops = field(default_factory=Flops)
    peak_bytes: int = 0
    report: Report | None = None
    step: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    choice: list[float] = field(default_factory=list)


class _Bench:
    """Model, optimizer and batch shared by the variants."""

    def __init__(self, shape: Shape, batch: int, threads: int) -> None:
        self.shape = shape
        self.model = build_model(shape, training=True)
        self.batch = make_batch(shape, batch, labels=True)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
        self.clock = Clock(shape.device, threads)

    def forward(self) -> Tensor:
        with self._autocast():
            return self.model(**self.batch).loss

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.shape.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.shape.device.type, self.shape.dtype)

    def count(self, variant: Variant, into: Measured) -> None:
        """Calibrates, then counts FLOPs and memory."""
        variant.calibrate(self.model, self.batch)
        set_train_mode(self.model)
        with variant.on(self.model) as attached:
            into.flops = measure_flops(lambda: self.forward().backward())
            self.optimizer.zero_grad()
            into.peak_bytes = self._peak()
            into.report = attached.report if attached is not None else None

    def _peak(self) -> int:
        if self.shape.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.forward().backward()
            self._update()
            return torch.cuda.max_memory_allocated()
        with SavedBytes(self.model) as saved:
            loss = self.forward()
        loss.backward()
        self._update()
        return saved.total

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def time(self, variant: Variant, into: Measured) -> None:
        """One timed step."""
        clock = self.clock
        with variant.on(self.model) as attached, timed_choices(attached, clock) as choice:
            clock.restart()
            loss = self.forward()
            into.forward.append(clock.lap())
            loss.backward()
            into.backward.append(clock.lap())
            self._update()
            into.optimizer.append(clock.lap())
            into.wall.append(clock.wall())
        into.step.append(into.forward[-1] + into.backward[-1] + into.optimizer[-1])
        into.choice.append(choice.seconds)


def bench_train(
    shape: str = "cpu",
    batch: int | None = None,
    repeats: int = 5,
    keep: float = 0.22,
    threads: int = 1,
    progress: Progress = lambda line: None,
) -> dict[str, Any]:
    """Measures a training step of all variants.

    Args:
        shape: a key of `SHAPES`.
        batch: rows of the batch, an image in each; None: the shape's number.
        repeats: timed steps of each variant.
        keep: target average of the pruned variants.
        threads: CPU threads.
        progress: told what happens.

    Returns:
        A JSON-able record; `rows` has one entry for each variant.

    Raises:
        ValueError: unknown shape, or a machine too small for it.
    """
    size = find_shape(shape)
    batch = batch or size.batch
    with use_threads(threads):
        bench = _Bench(size, batch, threads)
        variants = train_variants(size, keep)
        measured = take_turns(bench, variants, Measured, repeats, progress)
    dense = measured[variants[0].name]
    return {
        **header("train", shape, batch, keep, repeats, bench.clock),
        "parameters": _parameters(bench.model),
        "memory": "allocated, peak" if size.gpu_gib else "saved for the backward pass",
        "rows": [_row(name, found, dense, size, batch) for name, found in measured.items()],
    }


def _row(name: str, found: Measured, dense: Measured, shape: Shape, batch: int) -> dict[str, Any]:
    step, speedup = median(found.step), median(dense.step) / median(found.step)
    flop_speedup = dense.flops.all / found.flops.all
    seen_speedup = dense.flops.seen / found.flops.seen
    return {
        "variant": name,
        "step_s": step,
        "speedup": speedup,
        "flop_speedup": flop_speedup,
        "of_flop_bound": speedup / flop_speedup,
        "seen_flop_speedup": seen_speedup,
        "of_seen_flop_bound": speedup / seen_speedup,
        "peak_mb": found.peak_bytes / MB,
        "forward_s": median(found.forward),
        "backward_s": median(found.backward),
        "optimizer_s": median(found.optimizer),
        "wall_s": median(found.wall),
        "fastest_s": min(found.step),
        "slowest_s": max(found.step),
        "tflops": found.flops.all / 1e12,
        "selection_s": median(found.choice),
        "selection_share": median(found.choice) / step,
        **tokens_of(found.report, shape, batch),
    }


def _parameters(model: nn.Module) -> dict[str, int]:
    return {
        "all": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
