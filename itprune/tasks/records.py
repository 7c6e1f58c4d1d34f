"""`records`: any data in this project's own formats, LLaVA JSON or JSONL with answers.

What is right is said by the option `metric`: the comparison's exact match, exact match after VQA's
normalisation, or ANLS for answers that are read off a picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from itprune.comparing.data import references
from itprune.comparing.scoring import is_right
from itprune.options import check_choice
from itprune.question import ROLES
from itprune.records import read_records
from itprune.tasks import register_task
from itprune.tasks.base import SCORE, Item, Task
from itprune.tasks.edits import anls
from itprune.tasks.vqa_text import normalise

EXACT, NORMALISED, ANLS = "exact", "normalised", "anls"
KINDS = ("kind", "type", "question_type", "category")
"""Where a record may say what kind of question it is; the first that does counts."""


@register_task
class Records(Task):
    """Scored by the option `metric`, broken down by the records' own kinds."""

    name = "records"
    needs = "one or more LLaVA JSON or JSONL files whose records have answers"
    own_options = {"metric": "exact (default), normalised by VQA's rules, or anls"}  # noqa: RUF012

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
        if not isinstance(record, Mapping):
            raise ValueError(
                f"{path}: record {number} must be a JSON object, got {type(record).__name__}"
            )
        answers = references(record)
        if not answers:
            raise ValueError(
                f"{path}: record {number} has no answer to score with; it needs a last assistant "
                'turn, or "answer" (or a list "answers") beside its prompt'
            )
        name = record.get("id", record.get("question_id"))
        # Counted through one file only, numbers of a second file would meet those of the first.
        number_id = str(number) if len(self.files) == 1 else f"{path.name}:{number}"
        return Item(
            id=number_id if name is None else str(name),
            record=with_instruction(record, self.instruction),
            references=answers,
            kind=_kind(record),
        )


def with_instruction(record: Mapping[str, Any], instruction: str) -> Mapping[str, Any]:
    """The record with the instruction after its last question; a malformed one as it is.

    Args:
        record: as `Question.from_record` takes it.
        instruction: "" adds nothing.
    """
    if not instruction:
        return record
    if isinstance(record.get("prompt"), str):
        return {**record, "prompt": f"{record['prompt'].rstrip()}\n{instruction}"}
    layout = "messages" if record.get("messages") is not None else "conversations"
    role, text = ("role", "content") if layout == "messages" else ("from", "value")
    turns = record.get(layout)
    asking = [
        place
        for place, turn in enumerate(turns if isinstance(turns, list) else [])
        if isinstance(turn, Mapping) and ROLES.get(str(turn.get(role))) == "user"
    ]
    if not isinstance(turns, list) or not asking:
        return record
    changed = list(turns)
    content = turns[asking[-1]].get(text)
    if isinstance(content, list):
        content = [*content, {"type": "text", "text": f"\n{instruction}"}]
    else:
        content = f"{str(content).rstrip()}\n{instruction}"
    changed[asking[-1]] = {**turns[asking[-1]], text: content}
    return {**record, layout: changed}


def _kind(record: Mapping[str, Any]) -> str:
    found = (record[key] for key in KINDS if isinstance(record.get(key), str))
    return next(found, "")
