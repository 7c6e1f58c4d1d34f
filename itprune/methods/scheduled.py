"""What `gsearch` and `p_sigmoid` share (arXiv 2412.00556): a falling schedule r_1 >= … >= r_L.

Layer i runs on the best r_i of the visual tokens that entered, ranked by the attention of layer
i - 1; r_1 = 1. Rankings agree from layer to layer but for the first, so later sets are subsets of
earlier ones and the counts are all there is to choose. No code is published: whose attention ranks
is an option, and positions stay original.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from itprune.host import Host
from itprune.maths.schedule import check_schedule, drops
from itprune.methods.layered import Layered, check_query
from itprune.options import check_positive
from itprune.tokens import LayerTokens

KEEP = 0.125
"""The budget the publication's comparisons use: 87.5 % fewer visual tokens."""
SLOPE, USUAL_DEPTH = 0.3, 32
"""Sigmoid without a calibration: from nine tenths to one tenth in 15 of 32 layers."""


def default_keep(depth: int) -> float:
    """The budget without one; in a model of few layers, one that leaves some to the others."""
    return max(KEEP, 1.5 / depth)


def default_slope(depth: int) -> float:
    """The slope without a calibration: the same curve whatever the depth."""
    return SLOPE * USUAL_DEPTH / depth


@dataclass(frozen=True)
class ScheduleOptions:
    """Options of both methods."""

    schedule: tuple[float, ...] | None = None
    """One fraction for each LLM layer, used as it stands; null: found by the method."""
    query: str = "instruction"
    """Whose attention ranks: instruction (all its tokens behind the image) or last (its last)."""
    trials: int = 12
    """Values tried for each number that calibration searches."""
    seed: int = 0
    """Seed of the search."""

    def __post_init__(self) -> None:
        check_query(self.query)
        check_positive("prune.trials", self.trials)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"prune.seed: must lie in 0..2^32 - 1, got {self.seed}")


class Scheduled(Layered):
    """Runs a schedule; a subclass says which."""

    Options = ScheduleOptions

    def __init__(self, options: ScheduleOptions, host: Host) -> None:
        super().__init__(options, host)
        self._trying: tuple[float, ...] | None = None
        if self.depth < 2:
            raise ValueError(f"prune.method: needs at least 2 LLM layers, got {self.depth}")
        if options.schedule is not None:
            check_schedule("prune.schedule", options.schedule, self.depth)

    def schedule(self) -> tuple[float, ...]:
        """The fractions in force."""
        if self._trying is not None:
            return self._trying
        if self.options.schedule is not None:
            return tuple(self.options.schedule)
        return self.find()

    def find(self) -> tuple[float, ...]:
        """The schedule by the calibration, or without one."""
        raise NotImplementedError

    @contextmanager
    def trying(self, schedule: tuple[float, ...]) -> Iterator[None]:
        """Runs a candidate while calibrating.

        Raises:
            ValueError: the keep in force switches the method off.
        """
        if self.idle:
            raise ValueError(
                "prune.keep: 1.0 keeps every token, so there is nothing to calibrate; "
                "set a keep below 1, or null"
            )
        self._trying = schedule
        try:
            yield
        finally:
            self._trying = None

    @property
    def calibrates(self) -> bool:
        return self.options.schedule is None

    def plan(self) -> Mapping[int, float]:
        return drops(self.schedule())

    def score(self, tokens: LayerTokens) -> Tensor:
        return tokens.attention(tokens.asks if self.options.query == "instruction" else tokens.last)
