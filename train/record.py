"""run.json: the record of a run in its output folder, so that its figures can be told later.

It is written when training begins, at most once a minute while it runs, at every checkpoint and at
the end, in one step each, by rank 0. A run that goes on adds an entry to `attempts`, and one that
ended without a word is found out by the next. Nothing here can fail a run: a record that cannot be
written is told of once.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from itprune.reporting import RUN_FILE
from itprune.reporting.metrics import metrics_of
from itprune.writing import replace_text
from train.fingerprint import fingerprints
from train.guards.faults import Fault, first_line, told
from train.launcher import Launch
from train.recipe.config import Recipe
from train.surroundings import code, launcher, place, safe, software, without_secrets

FORMAT = 1
EVERY = 60.0
"""Seconds between two writes of a run that goes along."""
PATIENCE = 5.0
"""Seconds that the end of a run waits for fingerprints of its data."""
SIGNALLED = 128
"""Exit statuses above it are those of a run that was told to stop."""
LOST = "ended without a word: it was killed, or the machine went down"


class Record:
    """The record of one run.

    Args:
        path: the file; None: this process writes none.
        attempt: what is known of this attempt.
    """

    def __init__(self, path: Path | None, attempt: dict[str, Any]) -> None:
        self.path, self.attempt = path, attempt
        self._attempts = [*earlier(path), attempt] if path is not None else [attempt]
        self._since = int((attempt.get("from_checkpoint") or "-0").rpartition("-")[2])
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._written = 0.0
        self._told = False

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        args: TrainingArguments,
        launch: Launch,
        checkpoint: Path | None,
        samples: Mapping[str, int | None],
    ) -> Record:
        """Begins an attempt, and writes it on rank 0.

        Args:
            recipe: the run.
            args: the Trainer's arguments.
            launch: who started this process.
            checkpoint: where it goes on from.
            samples: of `train` and `val`; None: not known, or there is none.
        """
        if args.process_index != 0:
            return cls(None, {})
        now = _now()
        attempt = {
            "started": now,
            "seen": now,
            "ended": None,
            "outcome": {"state": "running", "step": 0, "sentence": None},
            "from_checkpoint": checkpoint.name if checkpoint is not None else None,
            "command": without_secrets(sys.argv),
            "recipe": recipe.to_dict(),
            "versions": software(),
            "git": code(),
            "machine": place(args.device),
            "launcher": launcher(launch),
            "processes": args.world_size,
            "samples": dict(samples),
            "data": None,
            "metrics": metrics_of([]),
        }
        record = cls(recipe.output / RUN_FILE, attempt)
        record._write()
        record._look_at_data({"train": recipe.data.train, "val": recipe.data.val})
        return record

    @contextmanager
    def watched(self, trainer: Any) -> Iterator[None]:
        """Keeps the record up while the trainer runs inside, and tells of its end."""
        trainer.add_callback(RecordCallback(self))
        try:
            yield
        except BaseException as error:
            self.note(trainer.state)
            self.end(*fate(error))
            raise
        self.note(trainer.state)
        self.end("finished", None)

    def note(self, state: Any) -> None:
        """Takes over step and figures of a TrainerState."""
        with self._lock:
            self.attempt["outcome"] = {**self._outcome, "step": state.global_step}
            self.attempt["metrics"] = metrics_of(state.log_history, self._since)

    def keep_up(self, state: Any, now: bool) -> None:
        """Takes over what a TrainerState holds and writes it: now, or where the last time is a
        while ago. A log of many thousand steps takes its time to sum up."""
        if now or time.monotonic() - self._written > EVERY:
            self.note(state)
            self._write()

    def lost(self, sentence: str) -> None:
        """The process is about to be ended by its watchdog."""
        self.end("failed", sentence, patience=0)

    def end(self, state: str, sentence: str | None, patience: float = PATIENCE) -> None:
        """Writes how the attempt ended; waits a little for data that is still being hashed."""
        if self._thread is not None:
            self._thread.join(patience)
        with self._lock:
            self.attempt["outcome"] = {**self._outcome, "state": state, "sentence": sentence}
            self.attempt["ended"] = _now()
        self._write()

    @property
    def _outcome(self) -> dict[str, Any]:
        return dict(self.attempt.get("outcome", {}))

    def _look_at_data(self, entries: Mapping[str, tuple[str, ...]]) -> None:
        """In a thread: files of many gigabytes on slow storage must not keep a run waiting."""

        def look() -> None:
            try:
                found = {name: fingerprints(files) for name, files in entries.items()}
            except (OSError, ValueError) as error:  # a file that went away since it was opened
                self._tell(error)
                return
            with self._lock:
                self.attempt["data"] = found
            self._write()

        self._thread = threading.Thread(target=look, name="fingerprints", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        if self.path is None:
            return
        with self._lock:
            self.attempt["seen"] = _now()
            self._written = time.monotonic()
            record = safe({"format": FORMAT, "attempts": self._attempts})
            text = json.dumps(record, indent=1, default=str)
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                replace_text(self.path, text + "\n")
            except OSError as error:
                self._tell(error)

    def _tell(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            print(f"{self.path}: not complete ({first_line(error)})", file=sys.stderr)


class RecordCallback(TrainerCallback):  # type: ignore[misc]
    """Keeps a record up while a Trainer runs."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.record.keep_up(state, now=False)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.record.keep_up(state, now=True)


def earlier(path: Path) -> list[dict[str, Any]]:
    """The attempts that a record holds; those that never told of their end are marked.

    What is no record is put aside as `NAME.damaged`, so that nothing is lost.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["attempts"]
        return [_settled(attempt) for attempt in found]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        aside = path.with_name(f"{path.name}.damaged")
        print(f"{path}: cannot be read and is kept as {aside.name}", file=sys.stderr)
        try:
            path.replace(aside)
        except OSError as error:
            print(f"{path}: cannot be put aside ({error.strerror})", file=sys.stderr)
        return []


def _settled(attempt: Mapping[str, Any]) -> dict[str, Any]:
    outcome = attempt["outcome"]
    if outcome["state"] != "running":
        return dict(attempt)
    return {**attempt, "outcome": {**outcome, "state": "lost", "sentence": LOST}}


def fate(error: BaseException) -> tuple[str, str]:
    """How an exception that ends a run is recorded: `stopped` or `failed`, and a sentence."""
    sentence, status, _ = told(error)
    stopped = isinstance(error, KeyboardInterrupt)
    stopped |= isinstance(error, Fault) and status > SIGNALLED
    if sentence is None:
        sentence = f"{type(error).__name__}: {first_line(error)}"
    return "stopped" if stopped else "failed", sentence


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
