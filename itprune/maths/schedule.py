"""Per-layer schedules: which fraction of the visual tokens each LLM layer runs on.

`keep` is that fraction averaged over the layers. The functions here go both ways between a schedule
and its average: stages (fractions that hold from one drop to the next) and whole schedules
r_1 … r_L, where r_1 = 1 since nothing can be ranked before the first layer has run.

The sigmoid r_i = 1 / (1 + exp(k (i - a))) is the one of P-Sigmoid (arXiv 2412.00556). With layer
centres i + 0.5 its integral over n layers is solved for the midpoint in closed form:

    a = ln((exp(k n b) - 1) / (1 - exp(-k n (1 - b)))) / k

for slope k and average b. A steep sigmoid is sampled too coarsely for the integral to be exact, so
the last fraction of a layer is found by bisection. Plain numbers throughout; results are cached,
since every forward asks again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

TINY = 1e-9
STEPS = 80
"""Bisection steps: more than a float64 has bits."""


def segment_lengths(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Layers run before the first drop, between drops, and after the last: one more than `layers`.

    Args:
        layers: ascending 0-based layers after which tokens are dropped.
        depth: LLM layers.
    """
    edges = (0, *(k + 1 for k in layers), depth)
    return tuple(b - a for a, b in pairwise(edges))


def stage_average(fractions: Sequence[float], layers: Sequence[int], depth: int) -> float:
    """Layer average when a fraction holds after each of `layers` and everything before them."""
    lengths = segment_lengths(layers, depth)
    return sum(f * n for f, n in zip((1.0, *fractions), lengths, strict=True)) / depth


@lru_cache(maxsize=1024)
def bend_stages(
    base: tuple[float, ...], layers: tuple[int, ...], depth: int, keep: float, method: str
) -> tuple[float, ...]:
    """Raises the fractions of the stages to the power that makes them average `keep`.

    A power keeps the shape of a published setting: fractions 1/2, 1/4, 1/8 become f, f^2, f^3.

    Args:
        base: one fraction in (0, 1) for each of `layers`, descending.
        layers: ascending 0-based layers after which tokens are dropped.
        depth: LLM layers.
        keep: layer-average target in (0, 1].
        method: name for the error message.

    Returns:
        One fraction in [0, 1] for each of `layers`.

    Raises:
        ValueError: `keep` is below what dropping everything at the first of `layers` reaches.
    """
    check_reach(keep, layers[0] + 1, depth, method)
    if keep * depth - (layers[0] + 1) <= TINY:
        return (0.0,) * len(base)
    low, high = 0.0, 1.0  # of share = p / (1 + p), so that every power p >= 0 is met
    for _ in range(STEPS):
        share = (low + high) / 2
        enough = stage_average(_powers(base, share), layers, depth) >= keep
        low, high = (share, high) if enough else (low, share)
    return _powers(base, low)


def _powers(base: tuple[float, ...], share: float) -> tuple[float, ...]:
    power = share / (1 - share) if share < 1 else math.inf
    return tuple(f**power for f in base)


def check_reach(keep: float, full_layers: int, depth: int, method: str) -> None:
    """Raises ValueError when `keep` asks for less than the `full_layers` first layers already run.

    Args:
        keep: layer-average target.
        full_layers: layers that run on every visual token whatever is dropped later.
        depth: LLM layers.
        method: name for the error message.
    """
    lowest = full_layers / depth
    if keep < lowest - TINY:
        shown = math.ceil(lowest * 10_000 - TINY) / 10_000
        raise ValueError(
            f"prune.keep: {keep} is out of reach of {method}, whose first {full_layers} of {depth} "
            f"layers run on every visual token; the lowest keep it can reach is {shown:g}"
        )


# ------------------------------------------------------------------------------- whole schedules
def schedule_average(schedule: Sequence[float]) -> float:
    """The `keep` a schedule amounts to."""
    return sum(schedule) / len(schedule)


def check_schedule(where: str, schedule: Sequence[float], depth: int) -> None:
    """Raises ValueError unless `schedule` is 1 = r_1 >= r_2 >= … >= r_depth >= 0."""
    if len(schedule) != depth:
        raise ValueError(
            f"{where}: needs one fraction for each of the {depth} LLM layers, got {len(schedule)}"
        )
    for layer, value in enumerate(schedule):
        if not 0 <= value <= 1:
            raise ValueError(
                f"{where}: must hold fractions from 0 to 1, got {value} at layer {layer}"
            )
    for layer, (before, value) in enumerate(pairwise(schedule)):
        if value > before:
            raise ValueError(
                f"{where}: must not rise, since dropped tokens cannot come back; "
                f"{value} at layer {layer + 1} follows {before}"
            )
    if schedule[0] != 1:
        raise ValueError(
            f"{where}: must start with 1, since nothing is dropped before the first layer, "
            f"got {schedule[0]}"
        )


def drops(schedule: Sequence[float]) -> dict[int, float]:
    """0-based layer after which tokens are dropped -> fraction that goes on."""
    return {i: after for i, (before, after) in enumerate(pairwise(schedule)) if after < before}


@lru_cache(maxsize=1024)
def fit_schedule(schedule: tuple[float, ...], keep: float, method: str) -> tuple[float, ...]:
    """Stretches a schedule so that it averages `keep`.

    For less, every layer behind the first is scaled down; for more, what each layer drops is. Both
    keep the order of the layers.

    Raises:
        ValueError: `keep` is below 1 / depth, the first layer's share.
    """
    depth = len(schedule)
    check_reach(keep, 1, depth, method)
    average = schedule_average(schedule)
    if keep > average:
        spared = (1 - keep) / (1 - average)
        return tuple(1 - (1 - r) * spared for r in schedule)
    rest = sum(schedule[1:])
    scale = (keep * depth - 1) / rest if rest > 0 else 0.0
    return (1.0, *(r * max(scale, 0.0) for r in schedule[1:]))


def sigmoid_midpoint(slope: float, average: float, depth: int) -> float:
    """Midpoint of the sigmoid whose integral over `depth` layers averages `average`.

    Args:
        slope: k > 0.
        average: in [0, 1]; the ends give -inf and inf.
        depth: layers; the first has its centre at 0.5.
    """
    if average <= 0 or average >= 1:
        return math.inf if average >= 1 else -math.inf
    grown, rest = slope * depth * average, slope * depth * (1 - average)
    # depth * average is grown / slope, which a steep slope would make infinite.
    bend = math.log(-math.expm1(-grown)) - math.log(-math.expm1(-rest))
    return depth * average + bend / slope


@lru_cache(maxsize=1024)
def sigmoid_schedule(slope: float, keep: float, depth: int, method: str) -> tuple[float, ...]:
    """r_1 = 1, then a falling sigmoid, averaging exactly `keep`.

    Args:
        slope: k > 0; near 0 all layers behind the first keep the same, large: a step.
        keep: layer-average target in (0, 1].
        depth: LLM layers.
        method: name for the error message.

    Returns:
        `depth` fractions, non-increasing, within [0, 1].

    Raises:
        ValueError: `keep` is below 1 / depth.
    """
    check_reach(keep, 1, depth, method)
    rest = depth - 1
    share = (keep * depth - 1) / max(rest, 1)
    if share <= TINY or share >= 1 - TINY:
        return (1.0, *([float(share > 0.5)] * rest))
    if slope * rest <= TINY:  # level; the midpoint would be out of sight
        return (1.0, *([share] * rest))
    guess, reach = sigmoid_midpoint(slope, share, rest), 1.0
    while not _mean(slope, guess - reach, rest) <= share <= _mean(slope, guess + reach, rest):
        reach *= 2
    low, high = guess - reach, guess + reach
    for _ in range(STEPS):
        middle = (low + high) / 2
        below = _mean(slope, middle, rest) < share
        low, high = (middle, high) if below else (low, middle)
    return (1.0, *_sigmoid(slope, high, rest))


def _sigmoid(slope: float, midpoint: float, depth: int) -> list[float]:
    """By tanh, which does not overflow."""
    return [(1 - math.tanh(slope * (i + 0.5 - midpoint) / 2)) / 2 for i in range(depth)]


def _mean(slope: float, midpoint: float, depth: int) -> float:
    return sum(_sigmoid(slope, midpoint, depth)) / depth
