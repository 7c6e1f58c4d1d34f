"""Samples with answers: LLaVA JSON or JSONL, split into a scored and a calibration part.

The two parts share no picture, so no method is fitted to what it is scored on. Both are drawn by a
fixed seed: every call on the same file sees the same samples.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from itprune.question import ROLES, ImageFolder, Question
from itprune.records import image_names, read_records

SHARE = 4
"""At most one picture in so many is set aside for calibration."""


@dataclass(frozen=True)
class Sample:
    """One record with an answer."""

    record: Mapping[str, Any]
    answers: tuple[str, ...]
    """Any of them is right."""
    pictures: tuple[str, ...]

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.record.get("id", ", ".join(self.pictures) or "without id"))

    def question(self, images: ImageFolder) -> Question:
        """The question, its images opened.

        Raises:
            ValueError: what is wrong with it.
        """
        return Question.from_record(self.record, images)


S = TypeVar("S", bound=Sample)


@dataclass(frozen=True)
class Parts:
    """What is scored, what is calibrated on, and how many records had no answer."""

    scored: list[Sample]
    calibration: list[Sample]
    unanswered: int


def read_parts(data: Path, limit: int | None, calibration: int) -> Parts:
    """Reads and splits a data file.

    Args:
        data: LLaVA JSON list or JSONL.
        limit: scored samples at most; None: all.
        calibration: samples to calibrate on at most, and at most a quarter of the pictures.

    Raises:
        ValueError: unreadable, or no record has an answer.
    """
    records = read_records(data)
    samples = [_sample(r) for r in records if isinstance(r, Mapping) and references(r)]
    if not samples:
        raise ValueError(
            f"{data}: no record has an answer to compare with; a record ends with an assistant "
            'turn, or holds "answer" (or a list "answers") beside its prompt'
        )
    scored, fitted = set_aside(samples, limit, calibration)
    return Parts(scored, fitted, len(records) - len(samples))


def set_aside(samples: Sequence[S], limit: int | None, calibration: int) -> tuple[list[S], list[S]]:
    """Splits samples into a scored and a calibration part that share no picture.

    Args:
        samples: all of them.
        limit: scored samples at most; None: all.
        calibration: samples to calibrate on at most, and at most a quarter of the pictures.

    Returns:
        The two parts, each in the order of the samples.
    """
    fitted = _calibration_pictures(samples, calibration)
    apart = [s for s in samples if fitted.isdisjoint(s.pictures)]
    scored = _draw(apart, len(apart) if limit is None else limit)
    inside = [s for s in samples if s.pictures and fitted.issuperset(s.pictures)]
    return scored, _draw(inside, calibration)


def references(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The right answers of a record: "answers", "answer", or its last assistant turn; () if none.

    A value that is no text is left out.
    """
    given = record.get("answers", record.get("answer"))
    if given is not None:
        found = given if isinstance(given, list) else [given]
        return tuple(text for text in found if isinstance(text, str))
    turns = record.get("conversations") or record.get("messages")
    last = turns[-1] if isinstance(turns, list) and turns else None
    if not isinstance(last, Mapping):
        return ()
    role = last.get("from", last.get("role"))
    if not isinstance(role, str) or ROLES.get(role) != "assistant":
        return ()
    content = last.get("value", last.get("content"))
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    text = "".join(t for t in texts if isinstance(t, str))
    return (text,) if text.strip() else ()


def _sample(record: Mapping[str, Any]) -> Sample:
    return Sample(record, references(record), tuple(dict.fromkeys(image_names(record))))


def _calibration_pictures(samples: Sequence[Sample], wanted: int) -> set[str]:
    """Pictures set aside: those of `wanted` samples, at most a quarter of all."""
    most = len({p for s in samples for p in s.pictures}) // SHARE
    shown = [s for s in samples if s.pictures]
    chosen: set[str] = set()
    for sample in random.Random(0).sample(shown, min(wanted, len(shown))):
        more = chosen.union(sample.pictures)
        chosen = more if len(more) <= most else chosen
    return chosen


def _draw(samples: Sequence[S], count: int) -> list[S]:
    """`count` of them at random, in their order."""
    chosen = random.Random(0).sample(range(len(samples)), min(count, len(samples)))
    return [samples[i] for i in sorted(chosen)]
