"""A training run, read from its folder.

run.json says what the run was; the trainer's log, in the folder or in its newest checkpoint, holds
the curve. Either is enough: runs older than run.json are told by log and recipe.yaml. Whatever is
read is checked here, so that nothing behind it meets a text where a number should be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from itprune.reporting import RUN_FILE, STATE_FILE
from itprune.reporting.metrics import metrics_of, number

RECIPE_FILE = "recipe.yaml"
WRONG = (KeyError, TypeError, ValueError, AttributeError, IndexError, yaml.YAMLError)
"""What reading a file that holds something else raises."""
Facts = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """One run, as its newest attempt left it."""

    folder: Path
    metrics: Facts
    """Of `metrics_of`."""
    history: Sequence[Mapping[str, Any]] = ()
    """The trainer's log."""
    recipe: Facts | None = None
    attempts: int | None = None
    """None: no run.json was written."""
    state: str = "unknown"
    """finished, stopped, failed, lost, running, or unknown."""
    sentence: str | None = None
    step: int | None = None
    steps: int | None = None
    """Planned."""
    started: str | None = None
    ended: str | None = None
    seen: str | None = None
    commit: str | None = None
    dirty: bool | None = None
    data: dict[str, tuple[tuple[str, str | None], ...]] | None = None
    """Name and fingerprint of each file of `train` and `val`."""
    samples: dict[str, int | None] = field(default_factory=dict)
    surroundings: Facts = field(default_factory=dict)
    """Versions, machine, launcher and processes, by dotted names."""

    @property
    def prune(self) -> Facts | None:
        """The section; None for a dense run, and where no recipe is known."""
        found = (self.recipe or {}).get("prune")
        return found if isinstance(found, dict) else None


def read_training(folder: Path) -> Training | None:
    """Reads a run's folder; None where it is not one.

    Raises:
        ValueError: a file in it is damaged, or holds something else.
    """
    states = [folder / STATE_FILE, *folder.glob(f"checkpoint-*/{STATE_FILE}")]
    if not (folder / RUN_FILE).is_file() and not any(path.is_file() for path in states):
        return None
    state = _state(folder)
    found = _load(folder, RUN_FILE)
    try:
        attempts = found["attempts"] if found is not None else []
        return _training(folder, attempts, state)
    except WRONG:
        raise ValueError(
            f"{folder}: its {RUN_FILE} is damaged or not one that training writes; move that file "
            "away, and the run is told by its log"
        ) from None


def _training(folder: Path, attempts: Sequence[Facts], state: Facts) -> Training:
    history = state.get("log_history", [])
    common = {
        "folder": folder,
        "history": history,
        "step": _whole(state.get("global_step")),
        "steps": _whole(state.get("max_steps")),
    }
    if not attempts:
        recipe = _recipe(folder)
        return Training(**common, recipe=recipe, metrics=metrics_of(history))
    last = attempts[-1]
    outcome, code = last["outcome"], (last["git"] or {}).get("project") or {}
    recorded = _figures(last["metrics"])
    planned = last["recipe"]["trainer"].get("max_steps")
    return Training(
        **{
            **common,
            "step": max(_whole(outcome["step"]) or 0, common["step"] or 0),
            "steps": common["steps"] or (_whole(planned) if planned != -1 else None),
        },
        metrics=recorded if recorded["loss"] is not None else metrics_of(history),
        recipe=dict(last["recipe"]),
        attempts=len(attempts),
        state=str(outcome["state"]),
        sentence=_text(outcome["sentence"]),
        started=_text(attempts[0]["started"]),
        ended=_text(last["ended"]),
        seen=_text(last["seen"]),
        commit=_text(code.get("commit")),
        dirty=bool(code["dirty"]) if code.get("dirty") is not None else None,
        data=_files(last["data"]),
        samples={name: _whole(value) for name, value in last["samples"].items()},
        surroundings=_surroundings(last),
    )


def _figures(found: Facts) -> Facts:
    """Recorded metrics, every value a number or None."""

    def pair(value: Facts | None) -> dict[str, float] | None:
        numbers = {} if value is None else {k: number(value[k]) for k in ("last", "best")}
        return {k: v for k, v in numbers.items() if v is not None} if all(numbers) else None

    return {
        "loss": pair(found["loss"]) or None,
        "eval": {str(name): told for name, v in found["eval"].items() if (told := pair(v))},
        **{name: number(found[name]) for name in ("step_time_s", "tokens_per_s", "peak_mb")},
    }


def _files(found: Facts | None) -> dict[str, tuple[tuple[str, str | None], ...]] | None:
    if found is None:
        return None
    return {
        part: tuple((str(one["name"]), _text(one["sha256"])) for one in files)
        for part, files in found.items()
    }


def _surroundings(last: Facts) -> Facts:
    flat = {f"versions.{name}": str(value) for name, value in last["versions"].items()}
    flat |= {f"machine.{name}": str(value) for name, value in last["machine"].items()}
    return {**flat, "launcher": str(last["launcher"]), "processes": str(last["processes"])}


def _state(folder: Path) -> Facts:
    """The trainer's log that goes furthest. That of a checkpoint may be cut short, which the run
    itself passes over; the folder's own may not."""
    found = [_load(folder, STATE_FILE) or {}]
    for path in folder.glob(f"checkpoint-*/{STATE_FILE}"):
        try:
            found.append(_load(path.parent, STATE_FILE) or {})
        except ValueError:
            continue
    for one in found:
        log = one.get("log_history", [])
        if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
            raise ValueError(f"{folder}: its {STATE_FILE} is not a trainer's log")
    return max(found, key=lambda one: _whole(one.get("global_step")) or 0)


def _load(folder: Path, name: str) -> Facts | None:
    """A JSON object of the folder; None where there is no such file."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        reason = "holds no object"
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    except (ValueError, RecursionError):
        reason = "is no JSON, or cut short"
    raise ValueError(f"{folder}: its {name} is damaged ({reason})")


def _recipe(folder: Path) -> Facts | None:
    path = folder / RECIPE_FILE
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, *WRONG):
        raise ValueError(f"{folder}: its {RECIPE_FILE} cannot be read") from None
    return found if isinstance(found, dict) else None


def _whole(value: Any) -> int | None:
    found = number(value)
    return int(found) if found is not None else None


def _text(value: Any) -> str | None:
    return str(value) if value is not None else None
