"""Handmade output folders: a training run's and a comparison's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

VERSIONS = {"itprune": "0.1.0", "torch": "2.13.0"}


def history(steps: int, start: float = 2.0) -> list[dict[str, Any]]:
    """A falling loss, with what the meter logs beside it."""
    return [
        {
            "step": step,
            "loss": start * math.exp(-step / 20) + 0.3,
            "step_time": 0.2,
            "tokens_per_s": 1000.0,
            "peak_mb": 500.0 + step,
        }
        for step in range(1, steps + 1)
    ]


def attempt(**changes: Any) -> dict[str, Any]:
    """A finished attempt, as training writes it."""
    return {
        "started": "2030-01-02T03:04:05+00:00",
        "seen": "2030-01-02T03:05:05+00:00",
        "ended": "2030-01-02T03:05:05+00:00",
        "outcome": {"state": "finished", "step": 30, "sentence": None},
        "from_checkpoint": None,
        "command": ["launch/train.py", "r.yaml"],
        "recipe": {
            "model": {"path": "m"},
            "data": {"train": ["d.json"]},
            "prune": {"method": "itprune", "keep": 0.22},
            "trainer": {"output_dir": "o", "max_steps": 30},
        },
        "versions": VERSIONS,
        "git": {"project": {"commit": "a" * 40, "dirty": False}, "working_directory": None},
        "machine": {"device": "cpu", "threads": 1},
        "launcher": "python",
        "processes": 1,
        "samples": {"train": 24, "val": 100},
        "data": {"train": [{"name": "d.json", "bytes": 3, "sha256": "ab" * 32, "of": "x"}]},
        "metrics": {
            "loss": {"last": 0.5, "best": 0.4},
            "eval": {
                "loss": {"last": 0.6, "best": 0.55},
                "accuracy": {"last": 0.5, "best": 0.6},
                "accuracy_keep_0.22": {"last": 0.5, "best": 0.6},
                "accuracy_keep_1.0": {"last": 0.75, "best": 0.75},
            },
            "step_time_s": 0.25,
            "tokens_per_s": 1234.5,
            "peak_mb": 800.0,
        },
        **changes,
    }


def training(
    folder: Path, attempts: list[dict[str, Any]] | None = None, log: Any = None, steps: int = 30
) -> Path:
    """A run's folder; `attempts` empty: without run.json."""
    folder.mkdir(parents=True)
    found = [attempt()] if attempts is None else attempts
    if found:
        (folder / "run.json").write_text(json.dumps({"format": 1, "attempts": found}))
    state = {"global_step": steps, "max_steps": 30, "log_history": history(steps)}
    (folder / "trainer_state.json").write_text(json.dumps(state if log is None else log))
    return folder


def row(method: str, keep: float, value: float | None, name: str = "accuracy") -> dict[str, Any]:
    """A line of a comparison; without a value one that could not be run."""
    known = value is not None
    return {
        "method": method,
        "keep": keep,
        name: value,
        "low": value - 0.1 if known else None,
        "high": value + 0.1 if known else None,
        "layer_average": keep if known else None,
    }


def comparison(folder: Path) -> Path:
    """An output folder of `itprune compare`."""
    folder.mkdir(parents=True)
    rows = [row("dense", 1.0, 0.8), row("itprune", 0.22, 0.7), row("itprune", 0.44, 0.75)]
    rows += [row("random", 0.22, 0.5), row("fastv", 0.11, None)]
    head = {"model": "m", "data": "val.json", "rows": rows}
    (folder / "compare.json").write_text(json.dumps(head))
    return folder


def evaluation(folder: Path) -> Path:
    """An output folder of `itprune eval` with two benchmarks, one of them in points."""
    folder.mkdir(parents=True)
    pope = [row("dense", 1.0, 0.8, "value"), row("itprune", 0.22, 0.7, "value")]
    mme = [row("dense", 1.0, 1500.0, "value"), row("itprune", 0.22, 1400.0, "value")]
    runs = [
        {"task": "pope", "metric": "f1", "share": True, "model": "m", "rows": pope},
        {"task": "mme", "metric": "mme_score", "share": False, "model": "m", "rows": mme},
    ]
    (folder / "eval.json").write_text(json.dumps({"runs": runs}))
    return folder
