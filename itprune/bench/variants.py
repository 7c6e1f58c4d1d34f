"""Variants: what a bench compares, each the bare model or the same model with a pruner attached.

All variants of a run share one model and one optimizer; a pruner is attached for one measurement
and detached again, so nothing but the pruner differs and memory holds one model only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from itprune.attach import Attached, attach
from itprune.bench.shape import Shape
from itprune.calibrating import calibrate
from itprune.calibration import Calibration
from itprune.config import PruneConfig
from itprune.methods.scheduled import Scheduled


@dataclass
class Variant:
    """One column of the comparison."""

    name: str
    config: PruneConfig | None
    """None: the bare model, nothing attached."""
    calibration: Calibration | None = None

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[Attached | None]:
        """Attaches the pruner for as long as the block runs."""
        if self.config is None:
            yield None
            return
        with attach(model, self.config, calibration=self.calibration) as attached:
            yield attached

    def calibrate(self, model: nn.Module, *batches: Mapping[str, Tensor]) -> None:
        """Meets the target average on what is measured.

        A schedule that would be searched is not: that takes longer than the bench, and the one that
        stands in for it costs the same to run.
        """
        with self.on(model) as attached:
            if attached is None or attached.method.idle or not attached.method.calibrates:
                return
            if not isinstance(attached.method, Scheduled):
                self.calibration = calibrate(attached, batches)


def train_variants(shape: Shape, keep: float) -> list[Variant]:
    """The variants of a training bench; the first one is what the others are compared with."""
    return [
        Variant("dense", None),
        Variant("dense_label_logits", PruneConfig(keep=1.0, label_only_logits="always")),
        Variant("pruned_padded", _one_stage(keep, "padded")),
        Variant("pruned_packed", _one_stage(keep, "packed")),
        Variant("two_stage_packed", _two_stages(shape, keep)),
        Variant("attached_keep_1", PruneConfig(keep=1.0)),
    ]


def infer_variants(shape: Shape, keep: float) -> list[Variant]:
    """The variants of an inference bench."""
    return [
        Variant("dense", None),
        Variant("pruned_padded", _one_stage(keep, "padded")),
        Variant("pruned_packed", _one_stage(keep, "packed")),
        Variant("two_stage_packed", _two_stages(shape, keep)),
    ]


def eval_variants(shape: Shape, keep: float) -> list[Variant]:
    """Of an evaluation's bench: dense as `itprune eval` runs it first, the bare model last."""
    bare, *pruned = infer_variants(shape, keep)
    return [Variant("dense", PruneConfig(keep=1.0)), *pruned, Variant("bare", bare.config)]


def _one_stage(keep: float, layout: str) -> PruneConfig:
    return PruneConfig(keep=keep, layout=layout, options={"stage2": None})


def _two_stages(shape: Shape, keep: float) -> PruneConfig:
    """0.22 as 0.33, and 0.11 from the middle of the LLM on: a second stage with much to do."""
    options = {"stage1": {"keep": min(1.5 * keep, 1.0)}, "stage2": {"layers": [shape.half_depth]}}
    return PruneConfig(keep=keep, options=options)
