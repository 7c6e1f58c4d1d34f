"""`records`: any data in this project's own formats, LLaVA JSON or JSONL with answers.

What is right is said by the option `metric`: the comparison's exact match, exact match after VQA's
normalisation, or ANLS for answers that are read off a picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from itprune.comparing.data import references
from itprune.comparing.scoring import is_right
from itprune.options import check_choice
from itprune.records import read_records
from itprune.tasks import register_task
from itprune.tasks.base import SCORE, Item, Task
from itprune.tasks.edits import anls
from itprune.tasks.files import as_mapping, no_answer
from itprune.tasks.prompts import with_instruction
from itprune.tasks.vqa_text import normalise

EXACT, NORMALISED, ANLS = "exact", "normalised", "anls"
KINDS = ("kind", "type", "question_type", "category")
"""Where a record may say what kind of question it is; the first that does counts."""


@register_task
class Records(Task):
    """Scored by the option `metric`, broken down by the records' own kinds."""

    name = "records"
    needs = "one or more LLaVA JSON or JSONL files whose records have answers"
    own_options: ClassVar = {"metric": "exact (default), normalised by VQA's rules, or anls"}

    def __init__(self, files: Sequence[Path], image_root: Path, options: Mapping[str, str]) -> None:
        super().__init__(files, image_root, options)
        self.rule = options.get("metric", EXACT)
        check_choice("task records: metric", self.rule, (EXACT, NORMALISED, ANLS))
        self.metric = "anls" if self.rule == ANLS else "accuracy"

    def read_items(self) -> Iterable[Item]:
        for path in self.files:
            for number, record in enumerate(read_records(path), 1):
                yield self._item(path, number, record)

    def score(self, item: Item, answer: str) -> dict[str, float]:
        if self.rule == ANLS:
            return {SCORE: anls(answer, item.references)}
        if self.rule == NORMALISED:
            right = {normalise(text) for text in item.references}
            return {SCORE: float(normalise(answer) in right)}
        return {SCORE: float(is_right(answer, item.references))}

    def _item(self, path: Path, number: int, record: Any) -> Item:
        where = f"{path}: record {number}"
        answers = references(as_mapping(record, where))
        if not answers:
            raise no_answer(where)
        name = record.get("id", record.get("question_id"))
        # Counted through one file only, numbers of a second file would meet those of the first.
        number_id = str(number) if len(self.files) == 1 else f"{path.name}:{number}"
        return Item(
            id=number_id if name is None else str(name),
            record=with_instruction(record, self.instruction),
            references=answers,
            kind=_kind(record),
        )


def _kind(record: Mapping[str, Any]) -> str:
    found = (record[key] for key in KINDS if isinstance(record.get(key), str))
    return next(found, "")
