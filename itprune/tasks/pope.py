"""`pope`: is this object in the picture? (Li et al., "Evaluating Object Hallucination", 2023)

JSON lines {"question_id", "image", "text", "label"}. As POPE's script reads an answer: of its first
sentence, without commas, the word No, no or not makes it a no; anything else is a yes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from itprune.records import read_records
from itprune.tasks import register_task
from itprune.tasks.base import SCORE, SHORT, Item, Task, check_some, mean
from itprune.tasks.files import as_mapping, no_answer, text_of

KINDS = ("adversarial", "popular", "random")
NO_WORDS = frozenset(("No", "no", "not"))


@register_task
class Pope(Task):
    """F1 of yes, and what it is made of; of several files the mean over their kinds, as papers
    give it."""

    name = "pope"
    needs = (
        "one or more of coco_pope_adversarial.json, coco_pope_popular.json, coco_pope_random.json"
    )
    metric = "f1"
    prompt = SHORT

    def read_items(self) -> Iterable[Item]:
        for path in self.files:
            for number, record in enumerate(read_records(path), 1):
                where = f"{path}: line {number}"
                yield self._item(path, as_mapping(record, where), where)

    def score(self, item: Item, answer: str) -> dict[str, float]:
        yes = not says_no(answer)
        return {SCORE: float(yes == (item.references[0] == "yes")), "yes": float(yes)}

    def total(
        self, items: Sequence[Item], scores: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        check_some(self.name, items)
        kinds: dict[str, list[tuple[bool, bool]]] = {}
        for item, score in zip(items, scores, strict=True):
            pair = (score["yes"] > 0, item.references[0] == "yes")
            kinds.setdefault(item.kind, []).append(pair)
        each = [figures(pairs) for pairs in kinds.values()]
        return {name: mean(one[name] for one in each) for name in each[0]}

    def _item(self, path: Path, record: Mapping[str, Any], where: str) -> Item:
        if record.get("label") is None:
            raise no_answer(where)
        label = text_of(record, "label", where).strip().lower()
        if label not in ("yes", "no"):
            raise ValueError(f"{where}: `label` must be yes or no, got {label!r}")
        kind = _kind(path, record)
        return Item(
            # Every file counts its questions from 1.
            id="/".join(part for part in (kind, text_of(record, "question_id", where)) if part),
            record={
                "prompt": self.asked(text_of(record, "text", where)),
                "image": text_of(record, "image", where),
            },
            references=(label,),
            kind=kind,
        )


def says_no(answer: str) -> bool:
    """Whether an answer is a no."""
    first = answer.partition(".")[0].replace(",", "")
    return not NO_WORDS.isdisjoint(first.split())


def figures(pairs: Iterable[tuple[bool, bool]]) -> dict[str, float]:
    """What counts give; a share of nothing is 0.

    Args:
        pairs: for each question whether yes was said, and whether yes was right.
    """
    column = list(pairs)
    said = sum(answer for answer, _ in column)
    true = sum(label for _, label in column)
    hits = sum(answer and label for answer, label in column)
    return {
        "f1": _share(2 * hits, said + true),
        "accuracy": _share(sum(answer == label for answer, label in column), len(column)),
        "precision": _share(hits, said),
        "recall": _share(hits, true),
        "yes_share": _share(said, len(column)),
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _kind(path: Path, record: Mapping[str, Any]) -> str:
    """From the file's name, else from the line's own category."""
    words = re.split(r"[^a-z]+", path.stem.lower())
    found = next((kind for kind in KINDS if kind in words), None)
    return found or str(record.get("category") or "")
