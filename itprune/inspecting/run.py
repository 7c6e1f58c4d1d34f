"""Run: look at all questions, write their pictures, then the page."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from itprune.attach import Attached
from itprune.checkpoint import Loaded
from itprune.comparing.data import references
from itprune.inspecting.costs import layer_costs
from itprune.inspecting.folder import OutputFolder
from itprune.inspecting.looking import Label, Looker
from itprune.inspecting.page import Header, Section, figures, make_page, make_section
from itprune.question import ImageFolder, Question, open_image
from itprune.records import read_records

Asked = tuple[Question, Label]


def inspect_questions(
    loaded: Loaded, asked: Iterable[Asked], folder: OutputFolder, model: str, max_new_tokens: int
) -> Path:
    """Looks at every question and writes the folder.

    Args:
        loaded: with a pruner attached.
        asked: questions, opened one by one.
        folder: checked already.
        model: its name on the page.
        max_new_tokens: of the answers.

    Returns:
        The page.

    Raises:
        ValueError: what is wrong with a question or with the folder, in one sentence.
    """
    looker = Looker(loaded, max_new_tokens)
    sections: list[Section] = []
    for number, (question, label) in enumerate(asked, 1):
        look = looker(question, label)
        if number == 1:
            look = looker(question, label)  # the first time measured caches being filled
            folder.open()  # not before a question was answered: what is there stays till then
        sections.append(make_section(look, number, folder.write_picture))
    if not sections:
        raise ValueError("there is no question to look at")
    header = make_header(looker.attached, model, str(looker.answerer.model.device))
    written = folder.write_page(make_page(header, sections, layer_costs(looker.family)))
    folder.write_figures({"model": model, "questions": figures(sections)})
    return written


def make_header(attached: Attached, model: str, device: str) -> Header:
    """What the page says of model and method."""
    method = attached.method
    notes = []
    aimed = attached.keep not in (None, 1.0)
    if aimed and method.calibrates and attached.calibration is None:
        notes.append(
            f"keep {attached.keep:g} was asked for, but nothing is calibrated, so the rule alone "
            "decides how many tokens stay."
        )
    if "pixels" in method.places:
        notes.append(
            "This method makes the picture smaller: kept places show how many tokens there are, "
            "not where they look."
        )
    where = f"a {device.upper()}" if device != "cpu" else f"a CPU ({platform.machine()})"
    return Header(
        model=model,
        method=attached.config.method,
        about=f"Method: {method.card.title}",
        target="its own rule decides how many"
        if attached.keep is None
        else f"keep {attached.keep:g}",
        device=where,
        notes=tuple(notes),
    )


# ----------------------------------------------------------------------------------- questions
def pairs(images: Sequence[str], prompts: Sequence[str]) -> list[Asked]:
    """One question a picture.

    Args:
        images: picture files.
        prompts: as many, or one for all.

    Raises:
        ValueError: another number, or a picture or prompt that cannot be used.
    """
    if not images:
        raise ValueError("give --image and --prompt, once or several times, or --data")
    if len(prompts) not in (1, len(images)):
        raise ValueError(
            f"{len(images)} --image and {len(prompts)} --prompt do not make pairs; give one "
            "--prompt for each --image, or one for all"
        )
    each = list(prompts) if len(prompts) == len(images) else list(prompts) * len(images)
    return [
        (Question.from_prompt(prompt, [open_image(image)]), Label(prompt, Path(image).name))
        for image, prompt in zip(images, each, strict=True)
    ]


class Records:
    """The questions of a data file, opened one by one.

    Args:
        data: LLaVA JSON list or JSONL.
        root: folder of its pictures; None: its own.
        limit: questions at most; None: all.

    Raises:
        ValueError: it cannot be read; while iterating, which record is wrong, and how.
    """

    def __init__(self, data: Path, root: Path | None, limit: int | None) -> None:
        self.data, self._records = data, read_records(data)[:limit]
        self._folder = ImageFolder(data.parent if root is None else root)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Asked]:
        for number, record in enumerate(self._records, 1):
            yield _record(self.data, number, record, self._folder)


def _record(data: Path, number: int, record: Any, folder: ImageFolder) -> Asked:
    try:
        question = Question.from_record(record, folder)
    except ValueError as error:
        raise ValueError(f"{data}: record {number}: {error}") from None
    assert isinstance(record, Mapping)
    name = record.get("id")
    last = question.messages[-1]["content"]
    text = " ".join(part["text"] for part in last if part["type"] == "text")
    return question, Label(text, "" if name is None else str(name), references(record))
