"""The output folder of `itprune compare` or `itprune eval`: scores of methods at budgets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itprune.reporting.metrics import number
from itprune.reporting.recorded import WRONG

FILES = ("eval.json", "compare.json")


@dataclass(frozen=True)
class Score:
    """One method at one budget; figures are None where it could not be run."""

    method: str
    keep: float | None
    value: float | None
    low: float | None
    high: float | None
    tokens: float | None
    """Visual tokens kept, as a share, averaged over the layers."""


@dataclass(frozen=True)
class Scores:
    """One benchmark of one model."""

    folder: Path
    model: str
    data: str
    metric: str
    scores: tuple[Score, ...]
    share: bool = True
    """Whether the metric is a share, which is shown in percent; else it is points."""


def read_scores(folder: Path) -> list[Scores]:
    """What a folder holds, one entry for each benchmark; none where it is no such folder.

    Raises:
        ValueError: a file in it is damaged, or holds something else.
    """
    found: list[Scores] = []
    for name in FILES:
        try:
            text = (folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            raise ValueError(f"{folder}: its {name} cannot be read") from None
        try:
            found += [_scores(folder, head) for head in _heads(json.loads(text))]
        except (*WRONG, RecursionError):
            command = name.removesuffix(".json")
            raise ValueError(
                f"{folder}: its {name} is damaged or not one that `itprune {command}` writes"
            ) from None
    return found


def _heads(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A comparison is one; an evaluation's folder may hold several."""
    if "rows" in record:
        yield record
    else:
        yield from record["runs"]


def _scores(folder: Path, head: Mapping[str, Any]) -> Scores:
    metric = str(head.get("metric", "accuracy"))
    return Scores(
        folder=folder,
        model=str(head["model"]),
        data=str(head["task"] if "task" in head else head["data"]),
        metric=metric,
        scores=tuple(_score(row) for row in head["rows"]),
        share=bool(head.get("share", True)),
    )


def _score(row: Mapping[str, Any]) -> Score:
    return Score(
        method=str(row["method"]),
        keep=number(row["keep"]),
        value=number(row["value"] if "value" in row else row["accuracy"]),
        low=number(row["low"]),
        high=number(row["high"]),
        tokens=number(row["layer_average"]),
    )
