"""The runs of an output folder: several calls, with other tasks or models, may share it.

DIR/answers/RUN/summary.json holds a run's facts and lines. A later call with more methods or
budgets adds lines; the tables and the picture of DIR show all runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itprune.evaluating.summary import Line, place
from itprune.writing import replace_text

ANSWERS = "answers"
SUMMARY = "summary.json"
NEEDED = {
    "run", "task", "metric", "share", "model", "data", "items", "bad", "calibration", "draws",
    "machine", "versions",
}  # fmt: skip
"""Facts that tables and pictures cannot do without."""


@dataclass(frozen=True)
class Run:
    """One model on one task with one set of settings."""

    head: Mapping[str, Any]
    """Task, model, data and settings."""
    lines: Sequence[Line]

    @property
    def percent(self) -> bool:
        """Whether its headline figure is a share; else it is points (MME's score)."""
        return bool(self.head["share"])

    @property
    def scale(self) -> float:
        """What its figures are shown times."""
        return 100.0 if self.percent else 1.0

    @property
    def unit(self) -> str:
        """For the heads of tables and pictures."""
        return f"{self.head['metric']}, %" if self.percent else str(self.head["metric"])

    def to_dict(self) -> dict[str, Any]:
        return {**self.head, "rows": list(self.lines)}


def run_folder(output: Path, task: str, fingerprint: str) -> Path:
    """Where the answers of a run lie."""
    return output / ANSWERS / f"{task}-{fingerprint}"


def put_run(folder: Path, run: Run) -> None:
    """Writes a run's summary; lines of earlier calls with other methods or budgets stay."""
    mine = {(line["method"], line["keep"]) for line in run.lines}
    earlier = _read(folder / SUMMARY)
    kept = [] if earlier is None else earlier.lines
    # Another set of questions counts now: lines over the old one are no company for these.
    same = earlier is not None and earlier.head["items"] == run.head["items"]
    old = [line for line in kept if same and (line["method"], line["keep"]) not in mine]
    joined = Run(run.head, sorted([*run.lines, *old], key=place))
    replace_text(folder / SUMMARY, json.dumps(joined.to_dict(), indent=1) + "\n")


def all_runs(output: Path) -> list[Run]:
    """The runs of a folder, by task, then model.

    Raises:
        ValueError: a summary is something else.
    """
    paths = sorted((output / ANSWERS).glob(f"*/{SUMMARY}"))
    found = [run for path in paths if (run := _read(path)) is not None]
    return sorted(found, key=lambda run: (run.head["task"], run.head["model"], run.head["run"]))


def _read(path: Path) -> Run | None:
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        lines = values.pop("rows")
        if not values.keys() >= NEEDED:
            raise KeyError
        return Run(values, list(lines))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path}: not a summary of `itprune eval`, so it is left alone; name another --output"
        ) from None
