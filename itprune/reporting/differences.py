"""What differs between runs: keys of recipes, software and machine, and data files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from itprune.reporting.recorded import Training

OWN = ("trainer.output_dir",)
"""Keys that every run has its own value of; they are its name."""
SHORT = 8
"""Letters of a fingerprint that are shown."""
Differences = dict[str, list[str | None]]
"""Dotted key -> its value in each run, as text; None: it has none."""


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections by dotted keys; lists stay whole."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def recipe_differences(runs: Sequence[Training]) -> Differences:
    """Keys whose values differ between the recipes that are known."""
    return _differing([flat(run.recipe) if run.recipe is not None else None for run in runs])


def surrounding_differences(runs: Sequence[Training]) -> Differences:
    """Software, machine, launcher and processes that differ."""
    return _differing([run.surroundings or None for run in runs])


def data_prints(runs: Sequence[Training]) -> list[str | None]:
    """One short fingerprint for all training files of each run, whatever their folder; None where
    it is not known."""
    return [_print(run) for run in runs]


def file_differences(runs: Sequence[Training]) -> list[str]:
    """Names of data files that not all runs read with the same content."""
    known = [{part: dict(files) for part, files in run.data.items()} for run in runs if run.data]
    found: dict[str, None] = {}
    for part in dict.fromkeys(part for one in known for part in one):
        for name in dict.fromkeys(name for one in known for name in one.get(part, {})):
            if len({one.get(part, {}).get(name, "not read") for one in known}) > 1:
                found[f"{part}: {name}"] = None
    return list(found)


def shown(value: Any) -> str:
    """A value of a recipe, as a reader writes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _differing(sides: Sequence[dict[str, Any] | None]) -> Differences:
    known = [side for side in sides if side is not None]
    found: Differences = {}
    for key in dict.fromkeys(key for side in known for key in side):
        if key in OWN or len({key in side and shown(side[key]) for side in known}) == 1:
            continue
        found[key] = [
            shown(side[key]) if side is not None and key in side else None for side in sides
        ]
    return found


def _print(run: Training) -> str | None:
    files = (run.data or {}).get("train")
    if not files:
        return None
    # A copy in another folder is the same data; a name on the hub is all that is known of it.
    marks = [digest or name for name, digest in files]
    return hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:SHORT]
