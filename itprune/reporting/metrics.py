"""The figures of a training log, in a few numbers: the last and the best of losses and
evaluations, the usual time of a step, and the largest memory."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

EVALUATED = re.compile(r"eval_((loss|accuracy)(?:_keep_[0-9]+(?:\.[0-9]+)?)?)")
"""What an evaluation measures: at the first budget, then at each that is named."""
LARGEST = 1e30
"""A figure beyond it is none: a log that holds it is damaged, and no axis could show it."""
Log = Sequence[Mapping[str, Any]]


def metrics_of(history: Log, since: int = 0) -> dict[str, Any]:
    """What a log comes to.

    Args:
        history: the trainer's `log_history`.
        since: the step that an attempt went on from; times and memory are those of the steps
            behind it, losses those of the whole run.

    Returns:
        `loss` and each entry of `eval` (`loss`, `accuracy`, `accuracy_keep_0.22` …) as
        {"last", "best"}; `step_time_s` and `tokens_per_s` as medians over the logged steps;
        `peak_mb`. None, or left out of `eval`, where nothing was logged.
    """
    logged = dict.fromkeys(name for entry in history for name in entry)
    names = [name for name in logged if EVALUATED.fullmatch(name)]
    own = [entry for entry in history if (number(entry.get("step")) or 0) > since]
    return {
        "loss": _last_and_best(values(history, "loss"), min),
        "eval": {
            name.removeprefix("eval_"): _last_and_best(values(history, name), _better(name))
            for name in names
        },
        "step_time_s": _median(values(own, "step_time")),
        "tokens_per_s": _median(values(own, "tokens_per_s")),
        "peak_mb": max(values(own, "peak_mb"), default=None),
    }


def values(history: Log, name: str) -> list[float]:
    """The numbers logged under a name; what is no number is left out."""
    found = (number(entry.get(name)) for entry in history)
    return [value for value in found if value is not None]


def number(value: Any) -> float | None:
    """A number between -LARGEST and LARGEST, or None: a log may hold NaN, and a file anything.

    What is as good as zero is zero, since a logarithm of it says nothing.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not abs(value) <= LARGEST:  # NaN, too
        return None
    return float(value) if abs(value) * LARGEST >= 1 else 0.0


def _better(name: str) -> Any:
    found = EVALUATED.fullmatch(name)
    return max if found is not None and found[2] == "accuracy" else min


def _last_and_best(found: Sequence[float], best: Any) -> dict[str, float] | None:
    return {"last": found[-1], "best": best(found)} if found else None


def _median(found: Sequence[float]) -> float | None:
    return round(statistics.median(found), 4) if found else None
