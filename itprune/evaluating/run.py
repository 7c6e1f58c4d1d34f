"""The order of an evaluation: prepare the cases, answer them, then one process joins and writes.

Every process does its share and meets the others twice. What has been answered already is found in
the folder of the run, which a fingerprint of model, data and settings names: a run that was killed
goes on, with any number of processes, and another model, data or setting has a folder of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from itprune.bench.record import machine, versions
from itprune.bench.timing import Clock
from itprune.checkpoint import Loaded
from itprune.comparing.answering import Asking, Encodings
from itprune.comparing.entries import Case
from itprune.comparing.subject import Subject
from itprune.evaluating.answers import Answers, Record
from itprune.evaluating.asking import Share, ask, prepare, refuse_many
from itprune.evaluating.bootstrap import Draws
from itprune.evaluating.claim import Claim
from itprune.evaluating.questions import Asked, Parts
from itprune.evaluating.runs import Run, put_run, run_folder
from itprune.evaluating.settings import SHORT, Settings, Team, fingerprint
from itprune.evaluating.summary import Answered, costs_of, summarise, timing_of
from itprune.tasks.base import Task


class Evaluation:
    """One task on one checkpoint.

    Args:
        task: the benchmark.
        parts: its items, split.
        settings: the checkpoint and numbers.
        cases: from `make_cases`; dense is among them.
        load: loads the model; called only when something is left to do.
        team: the processes that share it.
        tell: told what happens; None: there is no progress bar either.

    Raises:
        ValueError: nothing is left to score, or the folder cannot be used.
    """

    def __init__(
        self,
        task: Task,
        parts: Parts,
        settings: Settings,
        cases: Sequence[Case],
        load: Callable[[], Loaded],
        team: Team | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        if not parts.scored:
            raise ValueError(f"task {task.name}: no question is left to score")
        self.task, self.parts, self.settings = task, parts, settings
        self.team = team or Team()
        self.tell = tell
        self.run_name = fingerprint(settings, task, parts)[:SHORT]
        self.folder = run_folder(settings.output, task.name, self.run_name)
        self.answers = [Answers(self.folder, case) for case in cases]
        self._claim = Claim(self.folder)
        how = Asking(Encodings(task.image_root), settings.batch_size, settings.max_new_tokens)
        self.share = Share(parts, how, self.team, settings.max_bad)
        self._load = load
        self._subject: Subject | None = None

    @property
    def subject(self) -> Subject:
        """The model, loaded when first needed."""
        if self._subject is None:
            self._subject = Subject(self._load())
        return self._subject

    def run(self) -> None:
        """Answers what is missing; every process calls it.

        Raises:
            ValueError: dense does not run, too much cannot be read, memory does not suffice, or
                another call is at work in the folder.
        """
        with self._claim.kept():
            if self.team.rank == 0:
                self._claim.alone()
                for answers in self.answers:
                    answers.fold(self.settings.retry)
                self._claim.shared()
            self.team.wait()
            self._claim.shared()
            for index, answers in enumerate(self.answers):
                if index % self.team.size == self.team.rank and answers.head() is None:
                    self._tell(f"preparing {answers.case.name}")
                    prepare(self.subject, answers, self.share)
            self.team.wait()
            for answers in self.answers:
                self._ask(answers)
            self.team.wait()
        if self.team.rank != 0:  # the first one keeps its claim for `finish`
            self._claim.release()

    def finish(self) -> Run:
        """Joins the answers and scores them, after `run`; one process calls it.

        Raises:
            ValueError: too much cannot be read, or answers are missing.
        """
        with self._claim.kept():
            run = self._joined()
        self._claim.release()
        return run

    def _joined(self) -> Run:
        for answers in self.answers:
            answers.fold()
        bad = self._bad()
        refuse_many(bad, len(self.parts.scored), self.settings.max_bad)
        counted = self._counted({record["id"] for record in bad})
        answered = [self._score(answers, counted) for answers in self.answers]
        items = [sample.item for sample in counted]
        run = Run(self._head(bad, counted), summarise(self.task, items, answered))
        put_run(self.folder, run)
        return run

    # ------------------------------------------------------------------------ answers
    def _ask(self, answers: Answers) -> None:
        head = answers.head() or {}
        if "reason" in head:
            self._tell(f"{answers.case.name} is left out: {head['reason']}")
            return
        missing = self.share.missing(answers)
        if missing:
            total = self.share.count()
            done = total - sum(len(batch) for batch in missing)
            with self._bar(answers.case.name, total, done) as bar:
                ask(self.subject, answers, missing, self.share, bar.update)

    def _bad(self) -> list[Record]:
        """What could not be read, in any case, in the order of the questions."""
        errors: dict[str, Record] = {}
        for answers in self.answers:
            found = answers.read()
            errors |= {name: record for name, record in found.items() if "error" in record}
        return [errors[s.name] for s in self.parts.scored if s.name in errors]

    def _counted(self, bad: set[str]) -> list[Asked]:
        """The questions of groups that could all be read."""
        group, scored = self.task.group, self.parts.scored
        broken = {group(sample.item) for sample in scored if sample.name in bad}
        counted = [sample for sample in scored if group(sample.item) not in broken]
        if not counted:
            raise ValueError(f"task {self.task.name}: no question could be read")
        return counted

    def _score(self, answers: Answers, counted: Sequence[Asked]) -> Answered:
        """Scores a case; its file then says what every answer is worth, in the task's order."""
        head = answers.head() or {}
        if "reason" in head:
            return Answered(answers.case, reason=head["reason"])
        found = answers.read()
        missing = sum(sample.name not in found for sample in self.parts.scored)
        if missing:
            raise ValueError(
                f"{self.folder}: {missing} of {len(self.parts.scored)} answers of "
                f"{answers.case.name} are missing; all processes must see the same --output, and "
                "the same command again asks what is missing"
            )
        scores = {s.name: self.task.score(s.item, found[s.name]["answer"]) for s in counted}
        answers.write(
            [
                {**found[s.name], **self._verdict(s, scores.get(s.name, {}))}
                for s in self.parts.scored
            ]
        )
        records = [found[s.name] for s in counted]
        return Answered(answers.case, costs_of(records), timing_of(records), list(scores.values()))

    def _verdict(self, sample: Asked, score: dict[str, float]) -> Record:
        """What a reader of the answers looks for beside them."""
        item = sample.item
        return {"kind": item.kind, "references": list(item.references), **score}

    # ------------------------------------------------------------------------ facts
    def _head(self, bad: Sequence[Record], counted: Sequence[Asked]) -> dict[str, Any]:
        settings, task = self.settings, self.task
        clock = Clock(torch.device(settings.device), torch.get_num_threads())
        return {
            "run": self.run_name,
            "task": task.name,
            "metric": task.metric,
            "share": task.share,
            "model": str(settings.model),
            "data": [str(path) for path in task.files],
            "options": dict(task.options),
            "items": len(counted),
            "bad": [{"id": record["id"], "error": record["error"]} for record in bad],
            "calibration": len(self.parts.calibration),
            "draws": Draws(task, [sample.item for sample in counted]).count,
            "max_new_tokens": settings.max_new_tokens,
            "batch_size": settings.batch_size,
            "processes": self.team.size,
            "machine": machine(clock),
            "versions": versions(),
        }

    def _tell(self, line: str) -> None:
        if self.tell is not None:
            self.tell(line)

    @contextmanager
    def _bar(self, name: str, total: int, done: int) -> Iterator[Any]:
        """Progress on stderr, of this process's share."""
        with tqdm(
            total=total,
            initial=done,
            desc=name,
            unit="answer",
            disable=self.tell is None,
            file=sys.stderr,
        ) as bar:
            yield bar
