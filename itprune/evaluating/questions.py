"""A task's items as samples of a comparison: some to score, others to calibrate on.

No picture is on both sides, and a group (MME's pair of questions, MMBench's rotations) stays whole.
Both parts are drawn by a fixed seed: every call on the same files sees the same ones.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from itprune.comparing.data import Sample, set_aside
from itprune.question import ImageFolder, Question
from itprune.records import image_names, read_records
from itprune.tasks.base import Item, Task


@dataclass(frozen=True)
class Asked(Sample):
    """An item of a task."""

    task: Task
    item: Item

    @property
    def name(self) -> str:
        return self.item.id

    def question(self, images: ImageFolder) -> Question:
        """The item's question; the task knows where its pictures are."""
        return self.task.question(self.item)


@dataclass(frozen=True)
class Apart(Sample):
    """A record of another file, to calibrate on."""

    folder: ImageFolder

    def question(self, images: ImageFolder) -> Question:
        """The record's question; its pictures lie beside its own file."""
        return Question.from_record(self.record, self.folder)


@dataclass(frozen=True)
class Parts:
    """What is scored, and what is calibrated on."""

    scored: list[Asked]
    calibration: Sequence[Sample]


def split(task: Task, limit: int | None, calibration: int, data: Path | None = None) -> Parts:
    """Splits a task's items.

    Args:
        task: the benchmark.
        limit: scored items at most, give or take a group; None: all.
        calibration: samples to calibrate on at most, and at most a quarter of the pictures.
        data: LLaVA JSON or JSONL to calibrate on instead; then every item is scored.

    Raises:
        ValueError: `data` cannot be read.
    """
    samples = [_asked(task, item) for item in task.items]
    if data is not None:
        return Parts(_whole_groups(samples, limit), _others(data, calibration))
    scored, fitted = set_aside(samples, None, calibration)
    return Parts(_whole_groups(scored, limit), fitted)


def by_picture(samples: Sequence[Asked]) -> list[Asked]:
    """Questions about the same pictures side by side, where the tower sees these once a batch; the
    pictures in the order in which they come up."""
    together: dict[tuple[str, ...], list[Asked]] = {}
    for sample in samples:
        together.setdefault(tuple(image_names(sample.item.record)), []).append(sample)
    return [sample for alike in together.values() for sample in alike]


def _asked(task: Task, item: Item) -> Asked:
    names = tuple(dict.fromkeys(image_names(item.record)))
    group = task.group(item)
    if names and group != item.id:  # as if its items had a picture in common
        names = (*names, f"group {group}")
    return Asked(item.record, item.references, names, task, item)


def _others(data: Path, count: int) -> list[Apart]:
    folder = ImageFolder(data.parent)
    records = [r for r in read_records(data) if isinstance(r, Mapping) and image_names(r)]
    if not records:
        raise ValueError(f"{data}: no record shows a picture, so there is nothing to calibrate on")
    drawn = random.Random(0).sample(records, min(count, len(records)))
    return [Apart(record, (), tuple(image_names(record)), folder) for record in drawn]


def _whole_groups(samples: Sequence[Asked], limit: int | None) -> list[Asked]:
    """Groups at random until there are enough, in the order of the samples."""
    if limit is None or limit >= len(samples):
        return list(samples)
    members: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        members.setdefault(sample.task.group(sample.item), []).append(index)
    chosen: list[int] = []
    for group in random.Random(0).sample(list(members), len(members)):
        if len(chosen) >= limit:
            break
        chosen += members[group]
    return [samples[index] for index in sorted(chosen)]
