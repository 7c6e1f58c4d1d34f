"""BadSamples: what training skipped, counted once per sample over all ranks.

Batches carry the bad samples met while they were read. They are put together on all ranks at every
logging step, so all ranks come to the same decision to go on or to stop.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

Bad = tuple[int, str, str]
SHOWN = 5
ENOUGH = 1000
"""Samples of a stream among which bad ones are counted at least."""


class BadSamples:
    """The skipped samples of a run.

    Args:
        path: the report, one JSON line a sample; read back when a run resumes.
        allowed: how many may be bad before the run stops.
        total: samples of the data set, for the message.
        writes: whether this process writes the report and speaks.
    """

    def __init__(self, path: Path, allowed: int, total: int, writes: bool) -> None:
        self.path = path
        self.allowed = allowed
        self.total = total
        self.writes = writes
        self.known: set[int] = set()
        self.fresh: dict[int, Bad] = {}

    def __len__(self) -> int:
        return len(self.known)

    def restore(self) -> None:
        """Remembers what the run reported before it was interrupted."""
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            self.known = {json.loads(line)["index"] for line in lines if line.endswith("}")}

    def forget(self) -> None:
        """Removes the report of an earlier run in the same folder."""
        if self.writes:
            self.path.unlink(missing_ok=True)

    def meet(self, found: Iterable[Bad]) -> None:
        """Takes note of the bad samples of one batch."""
        for bad in found:
            if bad[0] not in self.known:
                self.fresh.setdefault(bad[0], bad)

    def settle(self) -> None:
        """Joins the ranks' findings; every rank must call it at the same step.

        Raises:
            ValueError: more samples are bad than `data.max_bad` allows.
        """
        from accelerate.utils import gather_object

        for bad in sorted(tuple(item) for item in gather_object(list(self.fresh.values()))):
            if bad[0] not in self.known:
                self.known.add(bad[0])
                self._report(bad)
        self.fresh = {}
        if len(self.known) > self.allowed:
            raise ValueError(self._verdict())

    def stop(self, found: Sequence[Bad]) -> NoReturn:
        """Ends the run at once: no good sample was found in place of these."""
        self.writes = True  # nobody else will: the other ranks wait for this one
        for index, bad in self.fresh.items():
            self.known.add(index)
            self._report(bad)
        _, place, reason = found[-1]
        if len(self.known) <= self.allowed:
            raise ValueError(reason)  # a file was lost, not a sample
        raise ValueError(f"{self._verdict()}; for example {place}: {reason}")

    def _verdict(self) -> str:
        return (
            f"data.max_bad: {len(self.known)} of {self.total} samples are bad, {self.allowed} are "
            f"allowed (listed in {self.path})"
        )

    def _report(self, bad: Bad) -> None:
        if not self.writes:
            return
        index, place, reason = bad
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"index": index, "where": place, "reason": reason}) + "\n")
        if len(self.known) <= SHOWN:
            print(f"skipped {place}: {reason}", file=sys.stderr)


class StreamedBadSamples(BadSamples):
    """The skipped samples of a stream, whose length nobody knows: judged among those read so far,
    as soon as they are enough to judge.

    Args:
        path: the report.
        max_bad: the fraction of bad samples that is allowed.
        seen: samples this rank has read.
        writes: whether this process writes the report and speaks.
    """

    def __init__(self, path: Path, max_bad: float, seen: Callable[[], int], writes: bool) -> None:
        super().__init__(path, int(max_bad * ENOUGH), 0, writes)
        self.max_bad, self.seen = max_bad, seen

    def settle(self) -> None:
        from accelerate.utils import gather_object

        self._judge(sum(gather_object([self.seen()])))
        super().settle()

    def stop(self, found: Sequence[Bad]) -> NoReturn:
        self._judge(self.seen())
        super().stop(found)

    def _judge(self, total: int) -> None:
        self.total = total
        self.allowed = int(self.max_bad * max(total, ENOUGH))

    def _verdict(self) -> str:
        return (
            f"data.max_bad: {len(self.known)} of the {self.total} samples read so far are bad, "
            f"{self.allowed} are allowed (listed in {self.path})"
        )
