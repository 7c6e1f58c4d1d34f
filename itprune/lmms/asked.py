"""What lmms-eval's requests ask, as our questions.

A request names a document of a task and how to see it. lmms-eval hands over plain tuples; here
they get names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from itprune.question import Question, as_rgb


@dataclass(frozen=True)
class Asked:
    """One request."""

    index: int
    """Its place among the requests."""
    prompt: str
    settings: Mapping[str, Any]
    """How the answer is drawn, of a request to answer."""
    target: Any
    """The answer to be judged, or what gives it for a document; of a request to judge."""
    visuals: Callable[[Any], Any]
    """Gives a document's pictures."""
    document: int
    task: str
    split: str

    @classmethod
    def to_answer(cls, index: int, request: Any) -> Asked:
        """Of a `generate_until` request."""
        prompt, settings, visuals, document, task, split = request.args
        return cls(index, prompt, settings, None, visuals, document, task, split)

    @classmethod
    def to_judge(cls, index: int, request: Any) -> Asked:
        """Of a `loglikelihood` request.

        Raises:
            ValueError: it names no document.
        """
        if len(request.args) != 6:
            raise ValueError(
                "the metric acc_mutual_info asks for answers without a question, which a chat "
                "model cannot be asked; take it out of the task's metric_list"
            )
        prompt, target, visuals, document, task, split = request.args
        return cls(index, prompt, {}, target, visuals, document, task, split)

    def question(self, documents: Mapping[str, Any]) -> Question:
        """The question, with its pictures at `<image>` in the prompt, else in front of it.

        Args:
            documents: task -> split -> documents.

        Raises:
            ValueError: something that is no picture, or pictures and places that do not match.
        """
        shown = self.visuals(self._document(documents)) or []
        return Question.from_prompt(self.prompt, [_picture(visual) for visual in shown])

    def answer(self, documents: Mapping[str, Any]) -> str:
        """The answer to be judged."""
        if callable(self.target):
            return str(self.target(self._document(documents)))
        return str(self.target)

    def _document(self, documents: Mapping[str, Any]) -> Any:
        return documents[self.task][self.split][self.document]


def _picture(visual: Any) -> Image.Image:
    if not isinstance(visual, Image.Image):
        raise ValueError(
            f"the task shows a {type(visual).__name__} where only pictures can be shown; "
            "videos and sound are not read"
        )
    return as_rgb(visual)


def batches(asked: Sequence[Asked], size: int) -> Iterator[list[Asked]]:
    """Requests that can be answered together: drawn alike, long prompts first.

    Prompts of like length waste little on padding, and memory that does not suffice shows at once.
    """
    alike: dict[str, list[Asked]] = {}
    for one in asked:
        alike.setdefault(json.dumps(one.settings, sort_keys=True, default=str), []).append(one)
    for group in alike.values():
        group.sort(key=lambda one: -len(one.prompt))
        for start in range(0, len(group), size):
            yield group[start : start + size]
