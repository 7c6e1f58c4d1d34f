"""The order of a comparison: answer every case, then time all of them in turns, then write.

What has been done already is found in rows.jsonl by a fingerprint of model, data and settings. A
case added later is timed together with dense, so its ratios hold; `retime` measures all anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import itprune
from itprune.bench.record import machine, versions
from itprune.bench.timing import Clock
from itprune.calibration import Calibration
from itprune.checkpoint import Loaded
from itprune.comparing.answering import Asking, Encodings, UnreadableSample, answer_case
from itprune.comparing.data import Parts, read_parts
from itprune.comparing.entries import DENSE, Case
from itprune.comparing.rows import Row, Rows
from itprune.comparing.subject import Subject
from itprune.comparing.summary import Line, summarise
from itprune.comparing.timing import Item, Progress, Stopwatch
from itprune.fingerprint import digest, model_digest


@dataclass(frozen=True)
class Settings:
    """What a comparison runs on."""

    model: Path
    data: Path
    image_root: Path
    output: Path
    limit: int | None = None
    """Scored samples at most."""
    calibration: int = 64
    """Samples set aside to calibrate on, at most."""
    batch_size: int = 8
    """Samples answered, calibrated and timed together."""
    max_new_tokens: int = 16
    rounds: int = 5
    """Timed rounds; 0: nothing is timed."""
    threads: int = 1
    """CPU threads while timing."""
    device: str = "cpu"
    dtype: str | None = None
    retry: bool = False
    """Try the cases again that failed in an earlier run."""
    retime: bool = False
    """Time all cases again."""


class Comparison:
    """One comparison.

    Args:
        settings: model, data and numbers.
        cases: from `make_cases`; the first is dense.
        load: loads the model; called only when something is left to do.
        progress: told what happens.

    Raises:
        ValueError: the data or the folder cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        cases: Sequence[Case],
        load: Callable[[], Loaded],
        progress: Progress = lambda line: None,
    ) -> None:
        self.settings, self.progress = settings, progress
        self.parts = read_parts(settings.data, settings.limit, settings.calibration)
        run = fingerprint(settings, self.parts)
        self.cases = {case.key(run): case for case in cases}
        self.rows = Rows(settings.output)
        self._load = load
        self._subject: Subject | None = None
        self._encode = Encodings(settings.image_root)

    def run(self) -> None:
        """Does what is missing.

        Raises:
            ValueError: a sample, the dense model or the memory is at fault.
        """
        try:
            for key, case in self.cases.items():
                self._answer(key, case)
            if self.settings.rounds:
                self._time()
        except (UnreadableSample, MemoryError) as error:
            raise ValueError(str(error)) from None
        self.rows.settle()

    def lines(self) -> list[Line]:
        """The lines of the table, after `run`."""
        return summarise(self.cases, self.rows.rows)

    def head(self) -> dict[str, Any]:
        """What was compared, on what, after `run`."""
        chosen = self.settings
        timed = [row["time"] for row in self._own() if "clock" in row.get("time", {})]
        clock = Clock(torch.device(chosen.device), chosen.threads)
        return {
            "model": str(chosen.model),
            "data": str(chosen.data),
            "calibration": len(self.parts.calibration),
            "unanswered": self.parts.unanswered,
            "max_new_tokens": chosen.max_new_tokens,
            "machine": machine(clock),
            "versions": versions(),
            "timing": {**timed[0]["settings"], "clock": timed[0]["clock"]} if timed else None,
        }

    @property
    def subject(self) -> Subject:
        """The model, loaded when first needed."""
        if self._subject is None:
            self._subject = Subject(self._load())
        return self._subject

    # ------------------------------------------------------------------------ answers
    def _answer(self, key: str, case: Case) -> None:
        row = self.rows.get(key)
        if row is not None and ("answers" in row or not self.settings.retry):
            return
        self.progress(f"asking {case.name}")
        fresh: Row = {
            "key": key,
            "method": case.entry.label,
            "keep": case.keep,
            "seed": case.seed,
            "model": str(self.settings.model),
            "data": str(self.settings.data),
        }
        how = Asking(self._encode, self.settings.batch_size, self.settings.max_new_tokens)
        try:
            fresh["answers"] = answer_case(self.subject, case, self.parts, how)
        except ValueError as error:
            if case.entry.label == DENSE:
                raise
            fresh["reason"] = str(error)
            self.progress(f"  left out: {error}")
        self.rows.put(fresh)

    # ------------------------------------------------------------------------ time
    def _time(self) -> None:
        """Times what is missing, beside dense."""
        wanted = {
            "batch_size": self.settings.batch_size,
            "rounds": self.settings.rounds,
            "threads": self.settings.threads,
        }
        keys = [key for key in self._timed_keys() if self._untimed(self.rows[key], wanted)]
        if not keys:
            return
        dense = next(key for key, case in self.cases.items() if case.entry.label == DENSE)
        items = {key: self._item(key) for key in dict.fromkeys([dense, *keys])}
        seeing = [s for s in self.parts.scored if s.pictures][: self.settings.batch_size]
        watch = Stopwatch(self.subject, seeing, self._encode, self.settings.threads)
        watch.run(list(items.values()), self.settings.rounds, self.progress)
        if items[dense].failed:
            raise ValueError(f"timing dense: {items[dense].failed}")
        session = 1 + max((r.get("time", {}).get("session", 0) for r in self._own()), default=0)
        common = {"dense": items[dense].figures, "session": session, "settings": wanted}
        for key, item in items.items():
            time = {**item.figures, "clock": watch.clock.unit, **common}
            self.rows.put({**self.rows[key], "time": time})

    def _timed_keys(self) -> list[str]:
        """Answered cases, of each entry and budget the first seed."""
        first: dict[tuple[str, float], str] = {}
        for key, case in self.cases.items():
            if "answers" in self.rows[key]:
                first.setdefault((case.entry.label, case.keep), key)
        return list(first.values())

    def _untimed(self, row: Row, wanted: Mapping[str, Any]) -> bool:
        return self.settings.retime or row.get("time", {}).get("settings") != wanted

    def _own(self) -> list[Row]:
        return [row for key in self.cases if (row := self.rows.get(key)) is not None]

    def _item(self, key: str) -> Item:
        found = self.rows[key]["answers"]["calibration"]
        return Item(self.cases[key], None if found is None else Calibration.from_dict(found))


# ------------------------------------------------------------------------------- fingerprints
def fingerprint(settings: Settings, parts: Parts) -> str:
    """Of everything but the case that decides an answer."""
    return digest(
        {
            "version": itprune.__version__,
            "model": model_digest(settings.model),
            "scored": [sample.record for sample in parts.scored],
            "calibration": [sample.record for sample in parts.calibration],
            "images": str(settings.image_root.resolve()),
            "max_new_tokens": settings.max_new_tokens,
            "device": settings.device.partition(":")[0],
            "dtype": settings.dtype,
        }
    )
