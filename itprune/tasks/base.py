"""What a benchmark is: items with right answers, a score for each answer, and totals of scores.

A task reads the field's own files as they were published. Everything that is wrong with them is one
sentence, before a model is loaded: an unknown option, an item that occurs twice, an image that is
not there. What one task needs beyond that stands in its own file.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

from PIL import Image

from itprune.options import nearest
from itprune.question import ImageFolder, Question, open_image
from itprune.records import image_names

SCORE = "score"
SHORT = "Answer the question using a single word or phrase."
"""The field's usual prompt for short answers, as LLaVA-1.5 has it."""
LETTER = "Answer with the option's letter from the given choices directly."
"""Likewise, for multiple choice."""


@dataclass(frozen=True)
class Item:
    """One question of a benchmark."""

    id: str
    """Unique within the task."""
    record: Mapping[str, Any]
    """What `Question.from_record` takes; the task's instruction is already in it."""
    references: tuple[str, ...]
    """The right answers; of VQA what each human said."""
    kind: str = ""
    """Type of question for the break-down; "": none."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the scorer needs besides."""
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """Images that lie inside the data file, by the name the record calls them."""


class Task(ABC):
    """A benchmark on this machine.

    Attributes:
        items: the questions, in the order of the files.
        instruction: what stands after every question; the option `instruction` replaces it.
        image_root: the folder image names are relative to.
        options: what `read` was given.
    """

    name: ClassVar[str]
    """What the user calls it."""
    needs: ClassVar[str]
    """The files it reads, for messages and documents."""
    metric: str
    """The headline figure, a key of `total`."""
    share: ClassVar[bool] = True
    """The headline figure is a share in [0, 1]; else it is points."""
    prompt: ClassVar[str] = ""
    """The instruction when no option replaces it."""
    own_options: ClassVar[Mapping[str, str]] = {}
    """Option -> what it does."""

    def __init__(self, files: Sequence[Path], image_root: Path, options: Mapping[str, str]) -> None:
        self.files, self.image_root, self.options = tuple(files), image_root, dict(options)
        self.instruction = options.get("instruction", self.prompt)
        self.items: Sequence[Item] = ()

    @classmethod
    def read(
        cls, files: Sequence[Path], image_root: Path | None, options: Mapping[str, str]
    ) -> Self:
        """Reads a benchmark.

        Args:
            files: as `needs` says.
            image_root: folder of the images; None: that of the first file.
            options: `instruction` and those of `own_options`.

        Raises:
            ValueError: what is wrong with the files, in one sentence.
        """
        cls._check_call(files, options)
        root = cls.default_root(files) if image_root is None else image_root
        if not root.is_dir():
            raise ValueError(f"--image-root {root}: no such folder")
        task = cls(files, root, options)
        task.items = tuple(task.read_items())
        task._check_items()
        return task

    @classmethod
    def _check_call(cls, files: Sequence[Path], options: Mapping[str, str]) -> None:
        """Raises ValueError: an unknown option, or a file that is not there."""
        known = ["instruction", *cls.own_options]
        for option in options:
            if option not in known:
                raise ValueError(
                    f"task {cls.name}: unknown option {option!r}; {nearest(option, known)}"
                )
        if not files:
            raise ValueError(f"task {cls.name}: no file is given; it needs {cls.needs}")
        for path in files:
            if not path.exists():
                raise ValueError(f"{path}: no such file; task {cls.name} needs {cls.needs}")

    @classmethod
    def default_root(cls, files: Sequence[Path]) -> Path:
        """The folder of the images when the user names none."""
        return files[0].parent

    @abstractmethod
    def read_items(self) -> Iterable[Item]:
        """The items of `self.files`.

        Raises:
            ValueError: the files are of another format, or hold no answers.
        """

    @abstractmethod
    def score(self, item: Item, answer: str) -> dict[str, float]:
        """The figures of one answer; "score", in [0, 1], is among them."""

    def total(
        self, items: Sequence[Item], scores: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        """The figures of many answers; `metric` is among them. The mean, unless a task says else.

        Args:
            items: any of the task's items, whole groups of them; one may occur several times.
            scores: what `score` gave for each.

        Raises:
            ValueError: nothing to total.
        """
        check_some(self.name, items)
        return {self.metric: mean(score[SCORE] for score in scores)}

    def group(self, item: Item) -> str:
        """Items of one group belong together: they are drawn together by a bootstrap."""
        return item.id

    def question(self, item: Item) -> Question:
        """An item as a request to a model, its images opened.

        Raises:
            ValueError: what is wrong with it.
        """
        return Question.from_record(item.record, partial(self._open_image, item.pictures))

    def asked(self, text: str) -> str:
        """A question with the instruction after it."""
        return f"{text.rstrip()}\n{self.instruction}" if self.instruction else text

    def _open_image(self, pictures: Mapping[str, bytes], name: str) -> Image.Image:
        if name in pictures:
            return open_image(NamedBytes(pictures[name], name))
        return ImageFolder(self.image_root)(name)

    def _check_items(self) -> None:
        """Raises ValueError: no item, an id twice, an image that is not there."""
        where = self.files[0]
        if not self.items:
            raise ValueError(f"{where}: holds no questions for task {self.name}")
        seen: set[str] = set()
        for item in self.items:
            if item.id in seen:
                raise ValueError(
                    f"{where}: the id {item.id!r} occurs twice; every question needs its own"
                )
            seen.add(item.id)
        names = dict.fromkeys(
            name
            for item in self.items
            for name in image_names(item.record)
            if name not in item.pictures
        )
        check_images(self.image_root, list(names))


class NamedBytes(io.BytesIO):
    """An image inside a data file; error messages call it by its name."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self._name = name

    def __str__(self) -> str:
        return self._name


def check_images(root: Path, names: Sequence[str]) -> None:
    """Whether the images exist: each folder is listed once, no image is opened.

    Raises:
        ValueError: some are missing or lie elsewhere.
    """
    top = os.path.abspath(root)
    listed: dict[str, set[str]] = {}
    absent = []
    for name in names:
        folder, base = os.path.split(os.path.normpath(os.path.join(top, name)))
        if os.path.commonpath([top, folder]) != top or "://" in name:
            ImageFolder(root)(name)  # refuses it, in its own words
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if base not in listed[folder]:
            absent.append(name)
    if absent:
        raise ValueError(
            f"{len(absent)} of {len(names)} images are missing in {root}, the first is "
            f"{absent[0]!r}; name their folder with --image-root"
        )


# ------------------------------------------------------------------------------------- figures
def check_some(where: str, items: Sequence[Item]) -> None:
    """Raises ValueError when there are no items."""
    if not items:
        raise ValueError(f"task {where}: there are no answers to total")


def mean(values: Iterable[float]) -> float:
    """Of at least one value."""
    column = list(values)
    return sum(column) / len(column)


def share_all_right(
    task: Task, items: Sequence[Item], scores: Sequence[Mapping[str, float]]
) -> float:
    """The share of groups whose items are all right.

    A group drawn several times counts as often: an item weighs one over the number of different
    items of its group.
    """
    members: dict[str, set[str]] = defaultdict(set)
    wrong: set[str] = set()
    for item, score in zip(items, scores, strict=True):
        members[task.group(item)].add(item.id)
        if score[SCORE] < 1:
            wrong.add(task.group(item))
    weights = [1 / len(members[task.group(item)]) for item in items]
    right = sum(
        weight for item, weight in zip(items, weights, strict=True) if task.group(item) not in wrong
    )
    return right / sum(weights)
