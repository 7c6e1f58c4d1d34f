"""Everything a report tells, as plain values: what --json prints and the page shows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from itprune.reporting import RUN_FILE, STATE_FILE
from itprune.reporting.differences import (
    Differences,
    data_prints,
    file_differences,
    recipe_differences,
    surrounding_differences,
)
from itprune.reporting.metrics import number
from itprune.reporting.recorded import Training, read_training
from itprune.reporting.scored import FILES, Scores, read_scores

AT = re.compile(r"accuracy_keep_([0-9]+(?:\.[0-9]+)?)")
Z = 1.959964
"""Of a 95 % interval."""


@dataclass(frozen=True)
class Summary:
    """Runs and scores with the names they go by on the page."""

    runs: dict[str, Training]
    scores: dict[str, list[Scores]]
    recipe: Differences
    surroundings: Differences
    prints: list[str | None]
    files: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        prints = zip(self.runs.items(), self.prints, strict=True)
        return {
            "runs": [_run(name, run) | {"data": mark} for (name, run), mark in prints],
            "scores": [
                {"name": name, **asdict(one), "folder": str(one.folder)}
                for name, found in self.scores.items()
                for one in found
            ],
            "differences": {
                "recipe": self.recipe,
                "surroundings": self.surroundings,
                "data_files": self.files,
            },
        }


def summarise(folders: Sequence[Path]) -> Summary:
    """Reads all folders.

    Raises:
        ValueError: one is not there, given twice, of another kind, or damaged.
    """
    names = dict(zip(names_of(folders), folders, strict=True))
    runs: dict[str, Training] = {}
    scores: dict[str, list[Scores]] = {}
    for name, folder in names.items():
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        run, found = read_training(folder), read_scores(folder)
        if run is None and not found:
            wanted = ", ".join((RUN_FILE, STATE_FILE, *FILES[:-1]))
            raise ValueError(
                f"{folder}: is no run: it holds neither {wanted} nor {FILES[-1]}; give the output "
                "folder of a training, of `itprune eval` or of `itprune compare`"
            )
        if run is not None:
            runs[name] = run
        if found:
            scores[name] = found
    told = list(runs.values())
    return Summary(
        runs=runs,
        scores=scores,
        recipe=recipe_differences(told),
        surroundings=surrounding_differences(told),
        prints=data_prints(told),
        files=file_differences(told),
    )


def names_of(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell all folders apart.

    Raises:
        ValueError: a folder is given twice.
    """
    whole = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, whole, strict=True):
        if whole.count(path) > 1:
            raise ValueError(f"{folder}: is given twice")
    for length in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["/".join(path.parts[-length:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in whole]


def method(run: Training) -> str | None:
    """dense, or the method's name; None where no recipe is known."""
    if run.recipe is None:
        return None
    return str(run.prune.get("method", "itprune")) if run.prune is not None else "dense"


def keep(run: Training) -> str | None:
    """The budget, as a reader writes it; a schedule as `1.0 to 0.22`."""
    if run.prune is None:
        return None
    found = run.prune.get("keep")
    if found is None:
        return "as its rule decides"
    if isinstance(found, Mapping) and "from" in found and "to" in found:
        return f"{found['from']} to {found['to']}"
    return ", ".join(map(str, found)) if isinstance(found, list) else str(found)


def accuracies(run: Training) -> list[dict[str, float | None]]:
    """Accuracy of the last evaluation at each budget it names, else at the one in force.

    Returns:
        {"keep", "accuracy", "low", "high"} in the order of budgets; `low` and `high` are Wilson's
        95 % interval, None where the number of samples is not known.
    """
    told = run.metrics["eval"]
    found = {
        float(at[1]): pair["last"] for name, pair in told.items() if (at := AT.fullmatch(name))
    }
    only = _in_force(run)
    if not found and only is not None and "accuracy" in told:
        found = {only: told["accuracy"]["last"]}
    count = run.samples.get("val")
    return [
        dict(zip(("keep", "accuracy", "low", "high"), (k, a, *wilson(a, count)), strict=True))
        for k, a in sorted(found.items())
    ]


def wilson(share: float, count: int | None) -> tuple[float | None, float | None]:
    """The 95 % interval of a share of `count` samples."""
    if not count:
        return None, None
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    inside = share * (1 - share) / count + Z**2 / (4 * count**2)
    reach = Z * math.sqrt(max(inside, 0.0)) / (1 + Z**2 / count)
    return max(middle - reach, 0.0), min(middle + reach, 1.0)


def _in_force(run: Training) -> float | None:
    """The budget of evaluations that name none: of a schedule its end, of a list its first."""
    if run.recipe is None:
        return None
    if run.prune is None:
        return 1.0
    found = run.prune.get("keep")
    if isinstance(found, Mapping):
        found = found.get("to")
    if isinstance(found, list) and found:
        found = found[0]
    return number(found)


def _run(name: str, run: Training) -> dict[str, Any]:
    return {
        "name": name,
        "folder": str(run.folder),
        "method": method(run),
        "keep": keep(run),
        "state": run.state,
        "sentence": run.sentence,
        "step": run.step,
        "steps": run.steps,
        "attempts": run.attempts,
        "started": run.started,
        "ended": run.ended,
        "seen": run.seen,
        "commit": run.commit,
        "dirty": run.dirty,
        "samples": run.samples,
        "surroundings": run.surroundings,
        "metrics": run.metrics,
        "accuracy": accuracies(run),
    }
