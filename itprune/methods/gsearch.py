"""`gsearch`: the least visual tokens each LLM layer can do with, found greedily (arXiv 2412.00556).

From shallow to deep: with the layers before it frozen, layer i takes the least fraction that
keeps the calibration score, and so do all layers behind it until their turn comes. The score is the
agreement with the dense model.

- `weight` null: the least fraction whose score is at least 1 - allowance, by bisection, which a
  score that falls with the fraction allows. The allowance grows evenly with depth up to
  `tolerance`: with all of it granted at once the first layer would spend it.
- `weight` given: the published objective, score plus weight times the saving, by Bayesian
  optimisation.

The search takes no budget; a `keep` stretches what was found until it is met.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from itprune.calibration import Calibration
from itprune.maths.schedule import check_schedule, fit_schedule, schedule_average, sigmoid_schedule
from itprune.maths.search import maximise
from itprune.methods import register_method
from itprune.methods.base import Card, Trial
from itprune.methods.scheduled import Scheduled, ScheduleOptions, default_keep, default_slope
from itprune.options import check_positive
from itprune.tokens import Kept, LayerTokens


@dataclass(frozen=True)
class GSearchOptions(ScheduleOptions):
    """Options of `gsearch`."""

    tolerance: float = 0.01
    """Agreement with the dense model that may be lost in all."""
    weight: float | None = None
    """Trade-off: what a layer average of 0 instead of 1 is worth in agreement; null: tolerance."""
    every: int = 1
    """Layers that share one searched fraction; more makes calibration cheaper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"prune.tolerance: must be in [0, 1), got {self.tolerance}")
        if self.weight is not None and not self.weight > 0:
            raise ValueError(f"prune.weight: must be positive, got {self.weight}")
        check_positive("prune.every", self.every)


@register_method("gsearch")
class GSearch(Scheduled):
    """A schedule searched layer by layer."""

    Options = GSearchOptions
    card = Card(
        "schedule over the LLM's layers, searched greedily from shallow to deep",
        paper="2412.00556",
        count="schedule",
        training="calibration",
        notes="No code is published; whose attention ranks is ours (query). The published search "
        "takes no budget: prune.keep stretches the schedule it found. The constrained search "
        "bisects and grants its tolerance evenly with depth; option weight is the published "
        "Bayesian search of a weighted sum.",
    )

    def find(self) -> tuple[float, ...]:
        found = self._searched()
        if found is None:
            keep = default_keep(self.depth) if self.keep is None else self.keep
            return sigmoid_schedule(default_slope(self.depth), keep, self.depth, "gsearch")
        return found if self.keep is None else fit_schedule(found, self.keep, "gsearch")

    def _searched(self) -> tuple[float, ...] | None:
        return None if self.calibration is None else self.calibration.numbers("schedule")

    def use(self, calibration: Calibration | None) -> None:
        found = None if calibration is None else calibration.numbers("schedule")
        if found is not None:
            check_schedule("calibration", found, self.depth)
        super().use(calibration)

    @torch.no_grad()
    def after_layer(self, tokens: LayerTokens) -> Kept:
        if self.calibrates and self._trying is None and self._searched() is None:
            warnings.warn(
                f"keep={self.keep} is set but gsearch is not calibrated, so a sigmoid schedule "
                "stands in for the searched one; run `itprune calibrate`",
                stacklevel=2,
            )
        return super().after_layer(tokens)

    @torch.no_grad()
    def calibrate(self, trial: Trial) -> Calibration:
        """Searches every layer's fraction; about depth / every * trials calibration forwards."""
        schedule = (1.0,) * self.depth
        for layer in range(1, self.depth, self.options.every):
            if schedule[layer - 1] == 0:
                break
            least = self._least(trial, schedule, layer)
            schedule = _from(schedule, layer, least)
        return Calibration(found={"schedule": list(schedule)})

    def _least(self, trial: Trial, schedule: tuple[float, ...], layer: int) -> float:
        """The fraction for `layer` and, until their turn, all layers behind it."""

        def fidelity(fraction: float) -> float:
            with self.trying(_from(schedule, layer, fraction)):
                return trial.fidelity()

        options, high = self.options, schedule[layer - 1]
        if options.weight is not None:
            weight = options.weight

            def objective(fraction: float) -> float:
                saving = 1 - schedule_average(_from(schedule, layer, fraction))
                return fidelity(fraction) + weight * saving

            return maximise(objective, 0.0, high, options.trials, options.seed, first=(high, 0.0))
        enough = 1 - options.tolerance * min(layer + options.every, self.depth) / self.depth
        return _bisect(lambda fraction: fidelity(fraction) >= enough, high, options.trials)


def _bisect(holds: Callable[[float], bool], high: float, trials: int) -> float:
    """The least of `trials` tried fractions below `high` that holds; 0 is tried first."""
    if holds(0.0):
        return 0.0
    low = 0.0
    for _ in range(trials - 1):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _from(schedule: tuple[float, ...], layer: int, fraction: float) -> tuple[float, ...]:
    """The schedule with `fraction` from `layer` on."""
    return schedule[:layer] + (fraction,) * (len(schedule) - layer)
