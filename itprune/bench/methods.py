"""The bench of the methods: prefill of every one at one budget, and what its choices cost.

All that run without trained weights take part, with their default options. A token pruner is worth
its FLOP ratio only if choosing is cheap, so a row holds the seconds the method itself takes and
their share of the prefill they shorten. The bare model and both controls are always beside them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

from itprune.attach import Attached, base_model
from itprune.bench.counting import count_flops, timed_choices
from itprune.bench.infer import InferBench
from itprune.bench.record import Progress, header, tokens_of
from itprune.bench.shape import Shape
from itprune.bench.shapes import build_model, find_shape
from itprune.bench.timing import median, use_threads
from itprune.bench.turns import take_turns
from itprune.bench.variants import Variant
from itprune.comparing.entries import DENSE, Entry, parse_entries
from itprune.families import find_family
from itprune.host import Host
from itprune.methods import build_method, methods
from itprune.options import check_fraction
from itprune.report import Report


@dataclass
class Measured:
    """What was counted and timed of one method."""

    flops: int = 0
    report: Report | None = None
    note: str = ""
    prefill: list[float] = field(default_factory=list)
    choice: list[float] = field(default_factory=list)


class MethodsBench(InferBench):
    """Prefill alone, with the method's own seconds inside it."""

    def __init__(self, model: Any, shape: Shape, batch: int, threads: int, keep: float) -> None:
        super().__init__(model, shape, batch, threads, new=0)
        self.keep = keep

    def count(self, variant: Variant, into: Measured) -> None:  # type: ignore[override]
        """Calibrates, then counts FLOPs."""
        variant.calibrate(self.model, self.prompt)
        with variant.on(self.model) as attached:
            into.note = _note(attached, self.keep)
            into.flops = count_flops(self.prefill)
            into.report = attached.report if attached is not None else None

    def time(self, variant: Variant, into: Measured) -> None:  # type: ignore[override]
        """One timed prefill."""
        with variant.on(self.model) as attached, timed_choices(attached, self.clock) as choice:
            self.clock.restart()
            self.prefill()
            into.prefill.append(self.clock.lap())
        into.choice.append(choice.seconds)


@torch.no_grad()
def bench_methods(
    shape: str = "cpu",
    batch: int | None = None,
    repeats: int = 5,
    keep: float = 0.22,
    threads: int = 1,
    names: str = "",
    progress: Progress = lambda line: None,
) -> dict[str, Any]:
    """Measures the prefill of methods and their choices.

    Args:
        shape: a key of `SHAPES`.
        batch: rows of the batch, an image in each; None: the shape's number.
        repeats: timed rounds.
        keep: target average; a method that cannot reach it runs at its published setting.
        threads: CPU threads.
        names: methods, as `itprune compare` takes them; empty: all that need no training.
        progress: told what happens.

    Returns:
        A JSON-able record; `rows` has one entry for each method, the bare model first.

    Raises:
        ValueError: unknown shape or method, or a machine too small for the shape.
    """
    size = find_shape(shape)
    batch = batch or size.batch
    check_fraction("--keep", keep)
    entries = parse_entries(names or ",".join(untrained()))
    with use_threads(threads), warnings.catch_warnings():
        # A schedule that was not searched is said so in its row.
        warnings.filterwarnings("ignore", message=".* is not calibrated, so a sigmoid schedule")
        model = build_model(size, training=False)
        host = find_family(base_model(model)).host
        variants = [_variant(entry, keep, host) for entry in entries]
        bench = MethodsBench(model, size, batch, threads, keep)
        measured = take_turns(bench, variants, Measured, repeats, progress)
        head = header("methods", shape, batch, keep, repeats, bench.clock)
    dense = measured[DENSE]
    rows = [_row(v, measured[v.name], dense, size, batch) for v in variants]
    return {**head, "rows": rows}


def untrained() -> list[str]:
    """Methods that run as they come: `dense` and what has no weights to learn."""
    probes = {name: Entry.parse(name).probe() for name in methods()}
    return [name for name, method in probes.items() if method.card.training != "required"]


def _variant(entry: Entry, keep: float, host: Host) -> Variant:
    """The method at `keep`, or at its published setting where that is out of its reach.

    Raises:
        ValueError: it runs at neither.
    """
    if entry.method == DENSE:
        return Variant(entry.label, None)
    config = entry.config(keep)
    method = build_method(config.method, config.options, host)
    try:
        method.share(keep)
    except ValueError:
        config = entry.config(None)
        method.share(None)
    return Variant(entry.label, config)


def _note(attached: Attached | None, keep: float) -> str:
    """What is not as the budget and the defaults say."""
    if attached is None:
        return ""
    notes = []
    if attached.keep is None:
        notes.append(f"published setting, {keep:g} is out of reach")
    if attached.method.calibrates:
        notes.append("calibrated" if attached.calibration else "not searched")
    return "; ".join(notes)


def _row(
    variant: Variant, found: Measured, dense: Measured, shape: Shape, batch: int
) -> dict[str, Any]:
    prefill, choice = median(found.prefill), median(found.choice)
    speedup, flop_speedup = median(dense.prefill) / prefill, dense.flops / found.flops
    return {
        "variant": variant.name,
        "keep": 1.0 if variant.config is None else variant.config.keep,
        "note": found.note,
        "prefill_s": prefill,
        "speedup": speedup,
        "flop_speedup": flop_speedup,
        "of_flop_bound": speedup / flop_speedup,
        "fastest_s": min(found.prefill),
        "slowest_s": max(found.prefill),
        "gflops": found.flops / 1e9,
        "selection_s": choice,
        "selection_share": choice / prefill,
        **tokens_of(found.report, shape, batch),
    }
