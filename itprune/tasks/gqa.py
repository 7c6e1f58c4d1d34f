"""`gqa`: one right answer, matched exactly (Hudson and Manning, 2019).

The questions' JSON is an object: id -> {imageId, question, answer, types}. As LLaVA prepares
answers for GQA's evaluation: lower case, no spaces around, no period at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from itprune.options import check_choice
from itprune.records import read_json
from itprune.tasks import register_task
from itprune.tasks.base import SCORE, SHORT, Item, Task
from itprune.tasks.files import as_mapping, no_answer, text_of

KINDS = ("structural", "semantic", "detailed")


@register_task
class GQA(Task):
    """Broken down by the questions' structural, semantic or detailed types."""

    name = "gqa"
    needs = "one or more question files, as testdev_balanced_questions.json"
    metric = "accuracy"
    prompt = SHORT
    own_options: ClassVar = {"kind": "structural (default), semantic or detailed"}

    def read_items(self) -> Iterable[Item]:
        kind = self.options.get("kind", KINDS[0])
        check_choice("task gqa: kind", kind, KINDS)
        for path in self.files:
            for name, entry in as_mapping(read_json(path), str(path)).items():
                where = f"{path}: question {name}"
                if as_mapping(entry, where).get("answer") is None:
                    raise no_answer(where)
                types = as_mapping(entry.get("types") or {}, f"{where}: `types`")
                yield Item(
                    id=str(name),
                    record={
                        "prompt": self.asked(text_of(entry, "question", where)),
                        "image": f"{text_of(entry, 'imageId', where)}.jpg",
                    },
                    references=(text_of(entry, "answer", where),),
                    kind=str(types.get(kind) or ""),
                    facts={"types": dict(types)},
                )

    def score(self, item: Item, answer: str) -> dict[str, float]:
        return {SCORE: float(_plain(answer) in map(_plain, item.references))}


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()
