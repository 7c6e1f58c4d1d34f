"""Settings: what an evaluation runs on, who takes part, and what tells one run from another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import itprune
from itprune.evaluating.questions import Asked, Parts
from itprune.fingerprint import digest, model_digest
from itprune.tasks.base import Task

SHORT = 12
"""Digits of the fingerprint that stand in a folder's name."""


@dataclass(frozen=True)
class Settings:
    """What an evaluation runs on, besides task and cases."""

    model: Path
    output: Path
    batch_size: int = 8
    """Questions answered together."""
    max_new_tokens: int = 16
    max_bad: float = 0.01
    """Share of the questions that may be unreadable; they are left out."""
    device: str = "cpu"
    dtype: str | None = None
    retry: bool = False
    """Ask again what failed in an earlier run."""


@dataclass(frozen=True)
class Team:
    """The processes that share an evaluation."""

    rank: int = 0
    size: int = 1
    wait: Callable[[], None] = lambda: None
    """Returns when all processes have called it."""


def fingerprint(settings: Settings, task: Task, parts: Parts) -> str:
    """Of everything but the case that decides an answer and its score."""
    return digest(
        {
            "version": itprune.__version__,
            "model": model_digest(settings.model),
            "task": task.name,
            "options": dict(task.options),
            "scored": _contents(parts.scored),
            "calibration": [sample.record for sample in parts.calibration],
            "images": str(task.image_root.resolve()),
            "max_new_tokens": settings.max_new_tokens,
            "device": settings.device.partition(":")[0],
            "dtype": settings.dtype,
        }
    )


def _contents(samples: Sequence[Asked]) -> list[list[object]]:
    return [
        [
            sample.item.id,
            sample.record,
            sample.item.references,
            [hashlib.sha256(found).hexdigest() for found in sample.item.pictures.values()],
        ]
        for sample in samples
    ]
