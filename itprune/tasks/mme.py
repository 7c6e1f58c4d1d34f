"""`mme`: two yes-or-no questions a picture in fourteen categories (Fu et al., 2023).

Read from the release's folder (a folder for each category, lines "question TAB answer" in
PICTURE.txt), or from JSON lines or Parquet with question_id, question, answer, category and image.

A category's score is 100 * acc + 100 * acc+, acc+ being the share of pictures both of whose
questions are right; perception and cognition are sums over categories, and mme_score is the sum of
both. An answer is read as MME's tool does: yes or no among its first four letters, else wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from itprune.options import nearest
from itprune.records import read_records, read_text
from itprune.tasks import register_task
from itprune.tasks.base import (
    SCORE,
    SHORT,
    Item,
    Task,
    check_some,
    mean,
    share_all_right,
)
from itprune.tasks.files import as_mapping, no_answer, read_parquet, text_of

PERCEPTION = (
    "existence", "count", "position", "color", "posters",
    "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = (
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip
CATEGORIES = (*PERCEPTION, *COGNITION)
PUT = "Please answer yes or no."
"""How MME's questions end; the instruction takes its place."""
READ = 4
"""Letters of an answer that count."""
PAIR = 2
ENDINGS = (".jpg", ".png", ".jpeg")


@register_task
class MME(Task):
    """Scores of categories, perception, cognition and both."""

    name = "mme"
    needs = "the release's folder, or JSON lines or Parquet files with answers"
    metric = "mme_score"
    share = False
    prompt = SHORT

    @classmethod
    def default_root(cls, files: Sequence[Path]) -> Path:
        return files[0] if files[0].is_dir() else files[0].parent

    def read_items(self) -> Iterable[Item]:
        asked: Counter[str] = Counter()
        for path in self.files:
            if path.is_dir():
                entries = _folder(path)
            elif path.suffix == ".parquet":
                entries = _rows(path, read_parquet(path))
            else:
                entries = _rows(path, read_records(path))
            for where, entry in entries:
                item = self._item(where, entry, asked)
                asked[item.facts["picture"]] += 1
                yield item
        for name, count in asked.items():
            if count != PAIR:
                raise ValueError(
                    f"{self.files[0]}: MME asks {PAIR} questions about a picture, but {name!r} has "
                    f"{count}; both must have its name as `question_id`, or stand in its text"
                )

    def score(self, item: Item, answer: str) -> dict[str, float]:
        return {SCORE: float(said(answer) == item.references[0])}

    def total(
        self, items: Sequence[Item], scores: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        check_some(self.name, items)
        parts: dict[str, tuple[list[Item], list[Mapping[str, float]]]] = {}
        for item, score in zip(items, scores, strict=True):
            mine, theirs = parts.setdefault(item.kind, ([], []))
            mine.append(item)
            theirs.append(score)
        figures = {}
        for kind in (kind for kind in CATEGORIES if kind in parts):
            right = mean(score[SCORE] for score in parts[kind][1])
            figures[kind] = 100 * right + 100 * share_all_right(self, *parts[kind])
        perception = sum(figures.get(kind, 0.0) for kind in PERCEPTION)
        cognition = sum(figures.get(kind, 0.0) for kind in COGNITION)
        return {
            self.metric: perception + cognition,
            "perception": perception,
            "cognition": cognition,
            **figures,
        }

    def group(self, item: Item) -> str:
        return str(item.facts["picture"])

    def _item(self, where: str, entry: Mapping[str, Any], asked: Counter[str]) -> Item:
        category = text_of(entry, "category", where)
        if category not in CATEGORIES:
            raise ValueError(
                f"{where}: unknown category {category!r}; {nearest(category, CATEGORIES)}"
            )
        if entry.get("answer") is None:
            raise no_answer(where)
        answer = text_of(entry, "answer", where).strip().lower()
        if answer not in ("yes", "no"):
            raise ValueError(f"{where}: `answer` must be yes or no, got {answer!r}")
        key = "question" if entry.get("question") is not None else "text"
        picture = f"{category}/{text_of(entry, 'question_id', where).removeprefix(category + '/')}"
        name, inside = _image(entry, picture, where)
        return Item(
            id=f"{picture}#{asked[picture] + 1}",
            record={"prompt": self._put(text_of(entry, key, where)), "image": name},
            references=(answer,),
            kind=category,
            facts={"picture": picture},
            pictures=inside,
        )

    def _put(self, question: str) -> str:
        """The question with the instruction in place of MME's own, or as it stands without one."""
        return self.asked(question.replace(PUT, "").strip()) if self.instruction else question


def said(answer: str) -> str:
    """What an answer says: "yes", "no", or "" for anything else."""
    start = answer.strip().lower()[:READ]
    return next((word for word in ("yes", "no") if word in start), "")


def _image(entry: Mapping[str, Any], picture: str, where: str) -> tuple[str, dict[str, bytes]]:
    """The image's name and, of Parquet, its content."""
    image = entry.get("image")
    if isinstance(image, Mapping):
        if not isinstance(image.get("bytes"), bytes):
            raise ValueError(f"{where}: `image` holds no bytes")
        return picture, {picture: image["bytes"]}
    return text_of(entry, "image", where), {}


def _rows(path: Path, rows: Iterable[Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    for number, row in enumerate(rows, 1):
        where = f"{path}: row {number}"
        yield where, as_mapping(row, where)


def _folder(root: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """The questions of the release: some categories have folders of their own for images and
    texts, the others have both side by side."""
    found = [kind for kind in CATEGORIES if (root / kind).is_dir()]
    if not found:
        raise ValueError(f"{root}: not MME's folder, it has none of its categories as a folder")
    for kind in found:
        folder = root / kind
        apart = folder / "questions_answers_YN"
        texts = sorted((apart if apart.is_dir() else folder).glob("*.txt"))
        images = folder / "images" if (folder / "images").is_dir() else folder
        pictures = {path.stem: path for path in images.iterdir() if path.suffix.lower() in ENDINGS}
        for text in texts:
            if text.stem not in pictures:
                raise ValueError(f"{text}: has no picture {text.stem}.jpg or .png in {images}")
            picture = pictures[text.stem]
            for where, question, answer in _lines(text):
                yield (
                    where,
                    {
                        "category": kind,
                        "question_id": picture.name,
                        "question": question,
                        "answer": answer,
                        "image": str(picture.relative_to(root)),
                    },
                )


def _lines(text: Path) -> Iterable[tuple[str, str, str]]:
    """Where it stands, question and answer of each line."""
    for number, line in enumerate(read_text(text).splitlines(), 1):
        if line.strip():
            question, tab, answer = line.strip().partition("\t")
            if not tab:
                raise ValueError(f"{text}:{number}: must be a question, a tab and an answer")
            yield f"{text}:{number}", question, answer
