"""`vqav2` and `textvqa`: ten humans' answers, scored by how many of them agree.

VQAv2 (Goyal et al., 2017): the questions' and the annotations' JSON, images named as COCO's.
TextVQA (Singh et al., 2019): one JSON with both, images IMAGE_ID.jpg.

Both sides are normalised, as TextVQA's answer processor does. VQA's own script changes less of
what the humans said, so that some answers can never be right ("none", or "t-shirt" where all ten
agree); the option `humans=published` scores as it does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from itprune.options import check_choice
from itprune.records import read_json
from itprune.tasks import register_task
from itprune.tasks.base import SCORE, SHORT, Item, Task
from itprune.tasks.files import as_list, as_mapping, no_answer, text_of
from itprune.tasks.vqa_text import (
    left_as_published,
    normalise,
    normalise_read,
    soft_accuracy,
)

NAMES = ("coco2014", "coco2017")
NORMALISED, PUBLISHED = "normalised", "published"
KINDS = ("answer_type", "question_type")


@register_task
class VQAv2(Task):
    """Broken down by type of answer (yes/no, number, other) or of question ("how many", …)."""

    name = "vqav2"
    needs = "the questions' JSON and the annotations' JSON"
    metric = "accuracy"
    prompt = SHORT
    own_options: ClassVar = {
        "images": "coco2014: COCO_val2014_ID.jpg (default), or coco2017: ID.jpg",
        "kind": "answer_type (default) or question_type",
        "humans": "normalised (default), or published: as VQA's script leaves what they said",
    }

    def __init__(self, files: Sequence[Path], image_root: Path, options: Mapping[str, str]) -> None:
        super().__init__(files, image_root, options)
        self.scheme = options.get("images", NAMES[0])
        self.kind = options.get("kind", KINDS[0])
        self.humans = options.get("humans", NORMALISED)
        check_choice("task vqav2: images", self.scheme, NAMES)
        check_choice("task vqav2: kind", self.kind, KINDS)
        check_choice("task vqav2: humans", self.humans, (NORMALISED, PUBLISHED))

    def read_items(self) -> Iterable[Item]:
        asked, said = _questions_and_annotations(self.files)
        subset = asked[1].get("data_subtype", "val2014")
        annotations = {}
        for number, entry in enumerate(as_list(said[1]["annotations"], f"{said[0]}"), 1):
            where = f"{said[0]}: annotation {number}"
            name = text_of(as_mapping(entry, where), "question_id", where)
            if name in annotations:
                raise ValueError(f"{where}: question {name!r} has an annotation already")
            annotations[name] = entry
        for number, entry in enumerate(as_list(asked[1]["questions"], f"{asked[0]}"), 1):
            where = f"{asked[0]}: question {number}"
            name = text_of(as_mapping(entry, where), "question_id", where)
            if name not in annotations:
                raise no_answer(f"{where} (id {name!r})")
            start = f"COCO_{subset}_" if self.scheme == NAMES[0] else ""
            image = f"{start}{text_of(entry, 'image_id', where).zfill(12)}.jpg"
            notes = annotations[name]
            yield Item(
                id=name,
                record={"prompt": self.asked(text_of(entry, "question", where)), "image": image},
                references=_answers(notes, f"{said[0]}: the annotation of question {name}"),
                kind=str(notes.get(self.kind, "")),
            )

    def score(self, item: Item, answer: str) -> dict[str, float]:
        if self.humans == PUBLISHED:
            humans = left_as_published(item.references)
        else:
            humans = [normalise(text) for text in item.references]
        return {SCORE: soft_accuracy(normalise(answer), humans)}


@register_task
class TextVQA(Task):
    """Scored as the challenge's answer processor does."""

    name = "textvqa"
    needs = "TextVQA_0.5.1_val.json or a file of its format"
    metric = "accuracy"
    prompt = SHORT

    def read_items(self) -> Iterable[Item]:
        for path in self.files:
            content = as_mapping(read_json(path), str(path))
            if "data" not in content:
                raise ValueError(f"{path}: not TextVQA's JSON, it has no list `data`")
            for number, entry in enumerate(as_list(content["data"], str(path)), 1):
                where = f"{path}: question {number}"
                as_mapping(entry, where)
                yield Item(
                    id=text_of(entry, "question_id", where),
                    record={
                        "prompt": self.asked(text_of(entry, "question", where)),
                        "image": f"{text_of(entry, 'image_id', where)}.jpg",
                    },
                    references=_answers(entry, where),
                )

    def score(self, item: Item, answer: str) -> dict[str, float]:
        humans = [normalise_read(text) for text in item.references]
        return {SCORE: soft_accuracy(normalise_read(answer), humans)}


def _questions_and_annotations(
    files: Iterable[Path],
) -> tuple[tuple[Path, Mapping[str, Any]], tuple[Path, Mapping[str, Any]]]:
    """The two files, in whatever order they were given."""
    found: dict[str, tuple[Path, Mapping[str, Any]]] = {}
    for path in files:
        content = as_mapping(read_json(path), str(path))
        kinds = [kind for kind in ("questions", "annotations") if kind in content]
        if len(kinds) != 1:
            raise ValueError(f"{path}: not VQA's JSON, it has no list `questions` or `annotations`")
        if kinds[0] in found:
            raise ValueError(f"{path}: a second file of {kinds[0]}; give one of each")
        found[kinds[0]] = path, content
    if "questions" not in found:
        raise ValueError("task vqav2: the file of the questions is missing, only annotations given")
    if "annotations" not in found:
        raise no_answer(str(found["questions"][0]))
    return found["questions"], found["annotations"]


def _answers(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """What the humans said: texts, or objects with "answer"."""
    given = as_list(entry.get("answers") or [], f"{where}: `answers`")
    if not given:
        raise no_answer(where)
    said = (one if isinstance(one, Mapping) else {"answer": one} for one in given)
    return tuple(text_of(one, "answer", where) for one in said)
