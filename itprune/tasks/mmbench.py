"""`mmbench`: multiple choice with images inside a TSV (Liu et al., 2023).

Columns index, question, A to D, answer, image (base64) and, where there are any, hint, category,
l2-category and split. Rows whose index is N million and something ask question "something" again
with the options shifted: then a question is right when all its rows are (CircularEval). An image
that is a number is the image of that row.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from itprune.options import check_choice
from itprune.tasks import register_task
from itprune.tasks.base import (
    LETTER,
    SCORE,
    Item,
    Task,
    check_some,
    mean,
    share_all_right,
)
from itprune.tasks.files import no_answer, read_tsv
from itprune.tasks.letters import chosen_letter
from itprune.tasks.prompts import with_options

TURN = 1_000_000
LETTERS = "ABCD"
COLUMNS = ("index", "question", "A", "B", "image")
KINDS = ("category", "l2-category")
NOTHING = ("", "nan", "none")
"""What tables write where there is nothing."""


@dataclass(frozen=True)
class _Row:
    where: str
    index: int
    fields: Mapping[str, str]
    image: str
    """Digest of the image, or the number of the row that has it."""


@register_task
class MMBench(Task):
    """Accuracy over questions, and over those rows that ask for the first time."""

    name = "mmbench"
    needs = "a TSV with answers, as MMBench_DEV_EN.tsv"
    metric = "accuracy"
    prompt = LETTER
    own_options: ClassVar = {"kind": "category (default) or l2-category"}

    def read_items(self) -> Iterable[Item]:
        check_choice("task mmbench: kind", self._kind, KINDS)
        # The same picture stands in every turn of a question; it is kept once.
        pictures: dict[str, bytes] = {}
        rows = [row for path in self.files for row in _rows(path, pictures)]
        images = {row.index: row.image for row in rows}
        for row in rows:
            image = row.image
            if image not in pictures:
                image = images.get(int(image), "")
            if image not in pictures:
                raise ValueError(
                    f"{row.where}: its image is that of row {row.image}, which has none"
                )
            yield self._item(row, image, pictures[image])

    def score(self, item: Item, answer: str) -> dict[str, float]:
        return {SCORE: float(chosen_letter(answer, item.facts["options"]) == item.references[0])}

    def total(
        self, items: Sequence[Item], scores: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        check_some(self.name, items)
        first = [
            score[SCORE] for item, score in zip(items, scores, strict=True) if int(item.id) < TURN
        ]
        figures = {self.metric: share_all_right(self, items, scores)}
        return figures | ({"first_turn": mean(first)} if first else {})

    def group(self, item: Item) -> str:
        return str(int(item.id) % TURN)

    @property
    def _kind(self) -> str:
        return self.options.get("kind", KINDS[0])

    def _item(self, row: _Row, image: str, content: bytes) -> Item:
        answer = _filled(row.fields, "answer").upper()
        if not answer:
            raise no_answer(row.where)
        # "None" is nothing to most tables, unless it is the right answer.
        filled = [letter for letter in LETTERS if letter == answer or _filled(row.fields, letter)]
        options = {
            letter: text for letter in filled if (text := row.fields.get(letter, "").strip())
        }
        if answer not in options:
            raise ValueError(f"{row.where}: the answer {answer!r} is none of its options")
        question = with_options(row.fields["question"], _filled(row.fields, "hint"), options)
        return Item(
            id=str(row.index),
            record={"prompt": self.asked(question), "image": image},
            references=(answer,),
            kind=_filled(row.fields, self._kind),
            facts={"options": options, "split": _filled(row.fields, "split")},
            pictures={image: content},
        )


def _rows(path: Path, pictures: dict[str, bytes]) -> Iterator[_Row]:
    """The rows without their base64, which goes to `pictures`."""
    with closing(read_tsv(path, COLUMNS)) as rows:
        for number, fields in enumerate(rows, 1):
            yield _row(f"{path}: row {number}", fields, pictures)


def _row(where: str, fields: dict[str, str], pictures: dict[str, bytes]) -> _Row:
    if not fields["index"].isdecimal():
        raise ValueError(f"{where}: `index` must be a whole number, got {fields['index']!r}")
    image = fields.pop("image").strip()
    if not image:
        raise ValueError(f"{where}: has no image")
    if not image.isdecimal():
        image = _keep(image, where, pictures)
    return _Row(where, int(fields["index"]), fields, image)


def _keep(text: str, where: str, pictures: dict[str, bytes]) -> str:
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{where}: its image is not base64") from None
    digest = hashlib.sha256(content).hexdigest()
    pictures.setdefault(digest, content)
    return digest


def _filled(fields: Mapping[str, str], column: str) -> str:
    value = fields.get(column, "").strip()
    return "" if value.lower() in NOTHING else value
