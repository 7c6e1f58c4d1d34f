"""`scienceqa`: multiple choice from school lessons (Lu et al., 2022).

Read from problems.json with pid_splits.json, images SPLIT/PID/image.png or PID/image.png, or from
LLaVA's JSON of conversations. The questions with an image are scored unless `subset=all`: without
one there is nothing to prune.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from itprune.comparing.data import references
from itprune.options import check_choice, nearest
from itprune.records import read_json
from itprune.tasks import register_task
from itprune.tasks.base import LETTER, SCORE, Item, Task
from itprune.tasks.files import as_list, as_mapping, no_answer, text_of
from itprune.tasks.letters import stated_letter
from itprune.tasks.prompts import with_instruction, with_options

LETTERS = "ABCDE"
SUBSETS = ("image", "all")


@register_task
class ScienceQA(Task):
    """Broken down by subject."""

    name = "scienceqa"
    needs = "problems.json and pid_splits.json, or LLaVA's JSON of one split"
    metric = "accuracy"
    prompt = LETTER
    own_options: ClassVar = {
        "split": "of problems.json: test (default), val, minival, …",
        "subset": "image (default): questions with an image; or all",
    }

    def read_items(self) -> Iterable[Item]:
        check_choice("task scienceqa: subset", self._subset, SUBSETS)
        contents = [(path, read_json(path)) for path in self.files]
        if any(isinstance(content, list) for _, content in contents):
            if "split" in self.options:
                raise ValueError("task scienceqa: LLaVA's JSON is one split; leave out `split`")
            for path, content in contents:
                yield from self._conversations(path, as_list(content, str(path)))
            return
        problems: dict[str, tuple[Path, Any]] = {}
        splits: Mapping[str, Any] | None = None
        for path, content in contents:
            if _is_splits(as_mapping(content, str(path))):
                splits = content
                continue
            twice = sorted(problems.keys() & content.keys())
            if twice:
                other, _ = problems[twice[0]]
                raise ValueError(f"{path}: problem {twice[0]!r} stands in {other} too")
            problems |= {name: (path, problem) for name, problem in content.items()}
        yield from self._problems(problems, splits)

    def score(self, item: Item, answer: str) -> dict[str, float]:
        letter = stated_letter(answer, item.facts["letters"])
        return {SCORE: float(letter == item.references[0])}

    @property
    def _subset(self) -> str:
        return self.options.get("subset", SUBSETS[0])

    # ----------------------------------------------------------------------------- problems.json
    def _problems(
        self, problems: Mapping[str, tuple[Path, Any]], splits: Mapping[str, Any] | None
    ) -> Iterable[Item]:
        split = self.options.get("split", "test")
        if splits is not None and split not in splits:
            raise ValueError(f"task scienceqa: no split {split!r}; {nearest(split, splits)}")
        chosen = None if splits is None else {str(name) for name in splits[split]}
        absent = sorted((chosen or set()) - problems.keys())
        if absent:
            raise ValueError(
                f"{self.files[0]}: {len(absent)} of {split}'s problems are missing, the first is "
                f"{absent[0]!r}; give the problems.json that belongs to the splits"
            )
        for name, (path, problem) in problems.items():
            where = f"{path}: problem {name}"
            entry = as_mapping(problem, where)
            inside = entry.get("split") == split if chosen is None else name in chosen
            if inside and (entry.get("image") or self._subset == "all"):
                yield self._problem(name, entry, split, where)

    def _problem(self, name: str, entry: Mapping[str, Any], split: str, where: str) -> Item:
        choices = [str(text) for text in as_list(entry.get("choices"), f"{where}: `choices`")]
        right = entry.get("answer")
        if right is None:
            raise no_answer(where)
        if (
            isinstance(right, bool)
            or not isinstance(right, int)
            or right not in range(len(choices))
        ):
            raise ValueError(f"{where}: `answer` must be the number of a choice, got {right!r}")
        if len(choices) > len(LETTERS):
            raise ValueError(
                f"{where}: has {len(choices)} choices, {len(LETTERS)} at most are known"
            )
        options = dict(zip(LETTERS, choices, strict=False))
        hint = str(entry.get("hint") or "").strip()
        question = with_options(
            text_of(entry, "question", where), f"Context: {hint}" if hint else "", options
        )
        record: dict[str, Any] = {"prompt": self.asked(question)}
        if entry.get("image"):
            folder = f"{split}/" if (self.image_root / split).is_dir() else ""
            record["image"] = f"{folder}{name}/{text_of(entry, 'image', where)}"
        return Item(
            id=name,
            record=record,
            references=(LETTERS[right],),
            kind=str(entry.get("subject") or ""),
            facts={"letters": LETTERS[: len(choices)], "topic": str(entry.get("topic") or "")},
        )

    # ----------------------------------------------------------------------------- LLaVA's form
    def _conversations(self, path: Path, entries: Iterable[Any]) -> Iterable[Item]:
        for number, entry in enumerate(entries, 1):
            where = f"{path}: record {number}"
            record = as_mapping(entry, where)
            if record.get("conversations") is None:
                raise ValueError(f"{where}: not LLaVA's ScienceQA, it has no `conversations`")
            if not record.get("image") and self._subset != "all":
                continue
            answers = references(record)
            letter = stated_letter(answers[0], LETTERS) if answers else ""
            if not letter:
                raise no_answer(where)
            yield Item(
                id=text_of(record, "id", where),
                record=with_instruction(record, self.instruction),
                references=(letter,),
                kind=str(record.get("subject") or ""),
                facts={"letters": LETTERS},
            )


def _is_splits(content: Mapping[str, Any]) -> bool:
    """Lists of problem numbers under names of splits; problems are objects."""
    return bool(content) and all(isinstance(value, list) for value in content.values())
