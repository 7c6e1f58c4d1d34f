"""The share of one process in the answers of a case.

Batches are the same whatever the number of processes: each takes every n-th of them. What cannot
be read is a record with its reason in place of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from itprune.answer import Answer, Answerer
from itprune.bench.timing import Clock
from itprune.calibration import Calibration
from itprune.comparing.answering import (
    Asking,
    Encodings,
    UnreadableSample,
    batches_of,
    calibrate_on,
)
from itprune.comparing.data import Sample
from itprune.comparing.entries import DENSE
from itprune.comparing.subject import Subject
from itprune.evaluating.answers import Answers, Record
from itprune.evaluating.questions import Asked, Parts, by_picture
from itprune.evaluating.settings import Team


@dataclass(frozen=True)
class Share:
    """What one process asks, and how."""

    parts: Parts
    how: Asking
    team: Team
    most_bad: float
    """Unreadable questions that are put up with."""

    def missing(self, answers: Answers) -> list[Sequence[Asked]]:
        """The batches of this process that hold a question without a record."""
        done = answers.read()
        return [batch for batch in self._mine() if any(s.name not in done for s in batch)]

    def count(self) -> int:
        """Questions of this process."""
        return sum(len(batch) for batch in self._mine())

    def _mine(self) -> Iterator[Sequence[Asked]]:
        samples = by_picture(self.parts.scored)
        for index, batch in enumerate(batches_of(samples, self.how.batch_size)):
            if index % self.team.size == self.team.rank:
                yield batch


def prepare(subject: Subject, answers: Answers, share: Share) -> None:
    """Calibrates where the method asks for it, and notes the result or what stands against it.

    Raises:
        ValueError: dense itself does not run.
    """
    case = answers.case
    try:
        with subject.wearing(case) as attached:
            answerer = subject.answerer(attached, share.how.max_new_tokens)
            readable = _readable(answerer, share.parts.calibration, share.how.encode)
            found = calibrate_on(attached, answerer, readable, share.how)
    except ValueError as error:
        if case.entry.label == DENSE:
            raise
        answers.put_head({"reason": str(error)})
        return
    answers.put_head({"calibration": None if found is None else found.to_dict()})


def ask(
    subject: Subject,
    answers: Answers,
    batches: Sequence[Sequence[Asked]],
    share: Share,
    step: Callable[[int], None],
) -> None:
    """Answers batches, and keeps the records of each as soon as they are there.

    A method that the model or the memory refuses is left out, with the reason.

    Args:
        subject: the model.
        answers: of the case, prepared.
        batches: from `Share.missing`.
        share: of this process.
        step: told how many questions are done.

    Raises:
        ValueError: more questions are unreadable than are put up with, or dense does not run.
    """
    head = answers.head() or {}
    fitted = head.get("calibration")
    calibration = None if fitted is None else Calibration.from_dict(fitted)
    clock = Clock(subject.model.device, torch.get_num_threads())
    bad: list[Record] = []
    with subject.wearing(answers.case, calibration) as attached:
        answerer = subject.answerer(attached, share.how.max_new_tokens)
        for batch in batches:
            try:
                records = _answer(answerer, batch, share.how.encode, clock)
            except ValueError as error:
                if answers.case.entry.label == DENSE:
                    raise
                answers.put_head({"reason": str(error)})
                return
            answers.append(share.team.rank, records)
            bad += [record for record in records if "error" in record]
            refuse_many(bad, len(share.parts.scored), share.most_bad)
            step(len(batch))


def refuse_many(bad: Sequence[Record], count: int, most: float) -> None:
    """Raises ValueError: more than the share `most` of the questions cannot be read."""
    if len(bad) > most * count:
        raise ValueError(
            f"{len(bad)} of {count} questions cannot be read, more than --max-bad {most:g} puts up "
            f"with; the first: {bad[0]['error']}; repair them and add --retry, or raise --max-bad"
        )


def _answer(
    answerer: Answerer, batch: Sequence[Asked], encode: Encodings, clock: Clock
) -> list[Record]:
    """One record a question, in their order."""
    records: list[Record] = []
    ready = []
    for sample in batch:
        record: Record = {"id": sample.name}
        try:
            ready.append((record, encode(answerer, sample)))
        except UnreadableSample as error:
            record["error"] = str(error)
        records.append(record)
    if not ready:
        return records
    clock.restart()
    found = answerer.answer([encoded for _, encoded in ready])
    seconds = clock.lap() / len(found)
    for (record, _), answer in zip(ready, found, strict=True):
        record.update(_figures(answer), seconds=round(seconds, 6), clock=clock.unit)
    return records


def _figures(answer: Answer) -> Record:
    return {
        "answer": answer.answer,
        "finish": answer.finish,
        "tokens_out": answer.tokens_out,
        "visual_in": answer.visual_in,
        "visual_llm": answer.visual_stage1,
        "layer_average": answer.visual_layer_average,
        "kv_entries": answer.kv_entries,
        "kv_bytes": answer.kv_bytes,
        "batch": answer.batch,
    }


def _readable(answerer: Answerer, samples: Sequence[Sample], encode: Encodings) -> list[Sample]:
    """Those that can be encoded: a calibration sample that cannot is missed by nobody."""
    found = []
    for sample in samples:
        try:
            encode(answerer, sample)
        except UnreadableSample:
            continue
        found.append(sample)
    return found
