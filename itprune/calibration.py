"""Calibration: one scalar per stage that makes a rule's counts hit a target average.

A rule decides how samples differ; the user decides how much is kept on average. `itprune calibrate`
runs a few hundred images, records what the raw rule would have kept of each, and stores those
fractions. Any later target is then one bisection away. What a later stage chooses from depends on
what an earlier one left, so its curve is exact at the budget it was measured at; measured at
several, it serves those between them as well.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

MAX_POINTS = 512
AT = "@"
"""Between a stage and the budget its curve was measured at."""


@dataclass(frozen=True)
class Curve:
    """What the raw rule kept of each calibration sample."""

    fraction: tuple[float, ...]
    """Share of its tokens the raw rule keeps, one per sample."""
    weight: tuple[float, ...]
    """The sample's share of all tokens the rule chose from."""

    def scale(self, target: float) -> float:
        """The factor a with weighted mean of min(1, a * fraction) = target (0 < target <= 1)."""
        return _solve(self, target)


@lru_cache(maxsize=256)
def _solve(curve: Curve, target: float) -> float:
    """By bisection; cached, since every forward asks again for the target in force."""
    fraction = torch.tensor(curve.fraction, dtype=torch.float64)
    weight = torch.tensor(curve.weight, dtype=torch.float64)
    weight = weight / weight.sum()
    low, high = 0.0, 1.0 / max(float(fraction.min()), 1e-6)
    for _ in range(60):
        middle = (low + high) / 2
        mean = float((weight * (middle * fraction).clamp(max=1.0)).sum())
        low, high = (middle, high) if mean < target else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Calibration:
    """One curve per stage, by the stage's name ("stage1", "stage2.10"), and the rules behind it.

    A stage measured at several budgets has a curve for each ("stage2.10@0.22") beside that of the
    first.
    """

    curves: Mapping[str, Curve] = field(default_factory=dict)
    rules: Mapping[str, str] = field(default_factory=dict)
    samples: int = 0
    found: Mapping[str, Any] = field(default_factory=dict)
    """A method's own record, plain JSON: a schedule, head masks, …"""
    host: Mapping[str, Any] = field(default_factory=dict)
    """Shape of the model it was made with."""

    def scale(
        self, stage: str, rule: str, target: float, keep: float | None = None
    ) -> float | None:
        """The scale for a stage, or None when this stage or rule was never calibrated.

        Args:
            stage: its name.
            rule: its rule.
            target: share of what it sees that it is to keep.
            keep: the budget in force; between two measured ones, the scale lies between theirs.
        """
        if self.rules.get(stage) != rule or stage not in self.curves:
            return None
        if keep is None or stage not in self._measured:
            return self.curves[stage].scale(target)
        points = self._measured[stage]
        below = [p for p in points if p[0] <= keep] or points[:1]
        above = [p for p in points if p[0] >= keep] or points[-1:]
        (low, first), (high, last) = below[-1], above[0]
        part = (keep - low) / (high - low) if high > low else 0.0
        return first.scale(target) * (1 - part) + last.scale(target) * part

    @cached_property
    def _measured(self) -> dict[str, list[tuple[float, Curve]]]:
        """Stage -> budgets in rising order, each with its curve."""
        found: dict[str, list[tuple[float, Curve]]] = {}
        for name, curve in self.curves.items():
            stage, several, keep = name.partition(AT)
            if several:
                found.setdefault(stage, []).append((float(keep), curve))
        return {
            stage: sorted(points, key=lambda point: point[0]) for stage, points in found.items()
        }

    def numbers(self, key: str) -> tuple[float, ...] | None:
        """A list of finite numbers, or a single one, that a method left in `found`; None: nothing.

        Raises:
            ValueError: something else is there.
        """
        if key not in self.found:
            return None
        value = self.found[key]
        listed = value if isinstance(value, list | tuple) else [value]
        if not listed or not all(isinstance(v, int | float) and math.isfinite(v) for v in listed):
            raise ValueError(
                f"calibration: {key!r} must hold finite numbers, got {value!r:.60}; "
                "run `itprune calibrate` again"
            )
        return tuple(map(float, listed))

    def to_dict(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "found": dict(self.found),
            "host": dict(self.host),
            "rules": dict(self.rules),
            "curves": {
                name: {"fraction": list(c.fraction), "weight": list(c.weight)}
                for name, c in self.curves.items()
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """Raises ValueError when `values` is not what `to_dict` wrote."""
        try:
            return cls(
                curves={
                    _checked(name): Curve(
                        tuple(map(float, c["fraction"])), tuple(map(float, c["weight"]))
                    )
                    for name, c in values["curves"].items()
                },
                rules={str(k): str(v) for k, v in values["rules"].items()},
                samples=int(values["samples"]),
                found=dict(values.get("found", {})),
                host=dict(values.get("host", {})),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"calibration: not a calibration record ({error!r})") from None


def merge_budgets(found: Mapping[float | None, Calibration]) -> Calibration:
    """Several budgets' calibrations as one; the first budget's stands for all others."""
    first = next(iter(found.values()))
    if len(found) == 1:
        return first
    differ = {
        s for s in first.curves if any(c.curves[s] != first.curves[s] for c in found.values())
    }
    each = {f"{s}{AT}{keep!r}": c.curves[s] for keep, c in found.items() for s in differ}
    return dataclasses.replace(first, curves={**first.curves, **each})


def _checked(name: Any) -> str:
    """The name of a curve; ValueError where its budget is no number."""
    stage, several, keep = str(name).partition(AT)
    return f"{stage}{AT}{float(keep)!r}" if several else stage


class Recorder:
    """Collects raw counts while a method runs over the calibration samples."""

    def __init__(self) -> None:
        self._seen: dict[str, list[tuple[float, float]]] = {}
        self._rules: dict[str, str] = {}

    def add(self, stage: str, rule: str, count: Tensor, of: Tensor) -> None:
        """Notes raw `count` (G,) tokens kept `of` (G,) tokens."""
        self._rules[stage] = rule
        pairs = zip(count.tolist(), of.tolist(), strict=True)
        self._seen.setdefault(stage, []).extend((c / n, float(n)) for c, n in pairs if n)

    def finish(self) -> Calibration:
        """Sorted by fraction and thinned to at most `MAX_POINTS`, so a checkpoint stays small."""
        curves, samples = {}, 0
        for stage, points in self._seen.items():
            points = sorted(points)
            samples = max(samples, len(points))
            step = max(len(points) / MAX_POINTS, 1.0)
            thin = [points[int(i * step)] for i in range(int(len(points) / step))]
            fraction, weight = zip(*thin, strict=True)
            curves[stage] = Curve(
                tuple(round(f, 6) for f in fraction), tuple(round(w, 6) for w in weight)
            )
        return Calibration(curves, self._rules, samples)
