"""What one case answers, and on how many tokens."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from itprune.answer import Answer, Answerer, Encoded
from itprune.attach import Attached
from itprune.calibrating import calibrate
from itprune.calibration import Calibration
from itprune.comparing.data import Parts, Sample
from itprune.comparing.entries import Case
from itprune.comparing.scoring import is_right
from itprune.comparing.subject import Subject
from itprune.question import ImageFolder

T = TypeVar("T")
CACHED = 2**30
"""Bytes of encoded samples kept between cases, so that pictures are not resized for each."""


class UnreadableSample(Exception):
    """A sample the data should not hold; no fault of a method."""


class Encodings:
    """Samples as tensors, made once while they fit into memory.

    Args:
        root: folder of the pictures.
    """

    def __init__(self, root: Path) -> None:
        self.images = ImageFolder(root)
        self._made: dict[int, Encoded] = {}
        self._room = CACHED

    def __call__(self, answerer: Answerer, sample: Sample) -> Encoded:
        """The sample's question as tensors.

        Raises:
            UnreadableSample: its picture or its text.
        """
        found = self._made.get(id(sample))
        if found is not None:
            return found
        try:
            encoded = answerer.encode(sample.question(self.images))
        except ValueError as error:
            raise UnreadableSample(f"sample {sample.name}: {error}") from None
        self._room -= sum(t.numel() * t.element_size() for t in encoded.inputs.values())
        if self._room > 0:
            self._made[id(sample)] = encoded
        return encoded


@dataclass(frozen=True)
class Asking:
    """How cases are asked."""

    encode: Encodings
    batch_size: int
    max_new_tokens: int


def answer_case(subject: Subject, case: Case, parts: Parts, how: Asking) -> dict[str, Any]:
    """Calibrates where the method asks for it, and answers the scored part.

    Returns:
        Plain figures. `right` has one digit a sample, 1 where the answer matches.

    Raises:
        ValueError: the method does not fit this model or this budget; in one sentence.
        UnreadableSample: the data is at fault.
    """
    with subject.wearing(case) as attached:
        answerer = subject.answerer(attached, how.max_new_tokens)
        calibration = calibrate_on(attached, answerer, parts.calibration, how)
        answers = [
            answer
            for batch in batches_of(parts.scored, how.batch_size)
            for answer in answerer.answer([how.encode(answerer, s) for s in batch])
        ]
    right = [is_right(a.answer, s.answers) for a, s in zip(answers, parts.scored, strict=True)]
    return {
        "right": "".join(str(int(r)) for r in right),
        **_tokens(answers),
        "calibration": None if calibration is None else calibration.to_dict(),
    }


def calibrate_on(
    attached: Attached, answerer: Answerer, samples: Sequence[Sample], how: Asking
) -> Calibration | None:
    """Fits the pruner at work where its method asks for it.

    Raises:
        ValueError: there is nothing to fit it to.
    """
    if attached.keep == 1.0 or not attached.method.calibrates:
        return None
    if not samples:
        raise ValueError("needs calibration, and the data has too few pictures to set any aside")
    batches = [
        answerer.collate([how.encode(answerer, s) for s in batch])
        for batch in batches_of(samples, how.batch_size)
    ]
    return calibrate(attached, batches, limit=len(samples))


def batches_of(samples: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """`size` of them at a time; the last may have fewer."""
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def _tokens(answers: Sequence[Answer]) -> dict[str, float]:
    """Means over the samples; visual figures over those with pictures."""
    seeing = [a for a in answers if a.visual_in]
    if not seeing:
        raise UnreadableSample("no sample of the data shows a picture")
    return {
        "visual_in": statistics.fmean(a.visual_in for a in seeing),
        "visual_llm": statistics.fmean(a.visual_stage1 for a in seeing),
        "layer_average": statistics.fmean(a.visual_layer_average or 0.0 for a in seeing),
        "kv_entries": statistics.fmean(a.kv_entries for a in answers),
    }
