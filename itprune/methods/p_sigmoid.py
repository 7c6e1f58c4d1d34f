"""`p_sigmoid`: the visual tokens fall along a sigmoid over the LLM's layers (arXiv 2412.00556).

The budget is given and the midpoint follows from it in closed form; the slope is the one number
left, and calibration finds it by Bayesian optimisation of the agreement with the dense model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from itprune.calibration import Calibration
from itprune.maths.schedule import sigmoid_schedule
from itprune.maths.search import maximise
from itprune.methods import register_method
from itprune.methods.base import Card, Trial
from itprune.methods.scheduled import Scheduled, ScheduleOptions, default_keep, default_slope

SLOPES = (0.1, 10.0)
"""Range searched, as multiples of the default: from almost level to a step."""


@dataclass(frozen=True)
class PSigmoidOptions(ScheduleOptions):
    """Options of `p_sigmoid`."""

    slope: float | None = None
    """Fall per layer at the midpoint, times 4; null: calibrated, and a gentle default without."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slope is not None and not self.slope > 0:
            raise ValueError(f"prune.slope: must be positive, got {self.slope}")


@register_method("p_sigmoid")
class PSigmoid(Scheduled):
    """A budget, a sigmoid, a searched slope."""

    Options = PSigmoidOptions
    card = Card(
        "sigmoid schedule over the LLM's layers that meets the budget; slope searched",
        paper="2412.00556",
        count="schedule",
        training="calibration",
        notes="No code is published; whose attention ranks is ours (query). The first layer "
        "always runs on everything and the sigmoid averages the rest of the budget; the "
        "searched score is the agreement with the dense model.",
    )

    def find(self) -> tuple[float, ...]:
        return self._at(self._slope())

    def _at(self, slope: float) -> tuple[float, ...]:
        keep = default_keep(self.depth) if self.keep is None else self.keep
        return sigmoid_schedule(slope, keep, self.depth, "p_sigmoid")

    def _slope(self) -> float:
        if self.options.slope is not None:
            return float(self.options.slope)
        found = None if self.calibration is None else self.calibration.numbers("slope")
        return default_slope(self.depth) if found is None else found[0]

    def use(self, calibration: Calibration | None) -> None:
        found = None if calibration is None else calibration.numbers("slope")
        if found is not None and not (len(found) == 1 and found[0] > 0):
            raise ValueError(f"calibration: 'slope' must be one positive number, got {found}")
        super().use(calibration)

    @property
    def calibrates(self) -> bool:
        return super().calibrates and self.options.slope is None

    @torch.no_grad()
    def calibrate(self, trial: Trial) -> Calibration:
        """Searches the slope for the budget in force; it serves other budgets, too."""

        def score(slope: float) -> float:
            with self.trying(self._at(slope)):
                return trial.fidelity()

        usual, options = default_slope(self.depth), self.options
        low, high = (usual * edge for edge in SLOPES)
        slope = maximise(score, low, high, options.trials, options.seed, first=(usual,), log=True)
        found = {"slope": slope, "keep": self.keep, "schedule": list(self._at(slope))}
        return Calibration(found=found)
