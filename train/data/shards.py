"""Shards: data files cut into parts that several readers share out among themselves.

A part hands out tickets, one for each record it holds, in the order of the file. A ticket reads its
record when it is called, which must be before the next one is asked for; one that is not called
costs next to nothing, so a run that goes on passes quickly over what it has had.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, Protocol

from torch.utils.data import get_worker_info

from train.data.files import CHUNK, DataFile
from train.data.messages import line_sample
from train.data.sample import BadSample, LostSource, Records, Sample

ROWS = 16
"""Rows of a `datasets` stream that are read at once."""


@dataclass(frozen=True)
class Raw:
    """A record as it was read: not parsed, no image opened."""

    where: str
    sample: Callable[[], Sample]
    """Parses it; raises BadSample."""


Ticket = Callable[[], Raw]


class Part(Protocol):
    """What one reader reads from front to end; can be sent to another process."""

    def tickets(self) -> Iterator[Ticket]:
        """One for each record; may raise LostSource."""
        ...


def broken(where: str, reason: str) -> Raw:
    """Stands for what cannot be read: one bad sample."""
    return Raw(where, partial(_refuse, reason))


def _refuse(reason: str) -> NoReturn:
    raise BadSample(reason)


@dataclass(frozen=True)
class Turn:
    """Every `of`-th record, from number `first` on: a part of a file that is not cut up."""

    first: int = 0
    of: int = 1

    def takes(self, number: int) -> bool:
        return number % self.of == self.first


EVERY = Turn()


def turns(count: int) -> list[Turn]:
    """The shares of `count` readers."""
    return [Turn(i, count) for i in range(count)]


@dataclass(frozen=True)
class LinesPart:
    """The lines of a JSONL file that begin between two bytes."""

    file: DataFile
    start: int
    end: int
    turn: Turn = EVERY

    def tickets(self) -> Iterator[Ticket]:
        whole = self.start == 0
        number = 0
        for row, (place, line) in enumerate(self._lines(), 1):
            if line.strip():
                if self.turn.takes(number):
                    where = (
                        f"{self.file.path}:{row}" if whole else f"{self.file.path}, byte {place}"
                    )
                    yield partial(Raw, where, partial(line_sample, line))
                number += 1

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Lines and where they begin; the last one may end behind this part."""
        # A part within the file begins behind the first line break from the byte before it on.
        inside = self.start > 0
        begin = self.start - 1 if inside else self.file.text_start()
        place, rest = begin, b""
        while begin < self.end:
            data = self.file.read(place, min(place + CHUNK, self.file.size))
            place += len(data)
            *lines, rest = (rest + data).split(b"\n")
            if not data:
                lines, rest = [rest], b""
            for line in lines:
                at, begin = begin, begin + len(line) + 1
                if at >= self.end:
                    return
                if not inside:
                    yield at, line
                inside = False
            if not data:
                return


@dataclass(frozen=True)
class GzipPart:
    """Every so-manieth line of a compressed JSONL file."""

    path: Path
    turn: Turn

    def tickets(self) -> Iterator[Ticket]:
        number, row = 0, 0
        try:
            with gzip.open(self.path, "rb") as file:
                for row, line in enumerate(file, 1):
                    if line.strip():
                        if self.turn.takes(number):
                            yield partial(Raw, f"{self.path}:{row}", partial(line_sample, line))
                        number += 1
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            yield partial(
                broken, f"{self.path}:{row + 1}", f"the file ends or breaks here ({error})"
            )
        except OSError as error:
            raise LostSource(f"{self.path}: cannot read the data ({error.strerror})") from None


@dataclass(frozen=True)
class RecordsPart:
    """Some records of a file with random access."""

    records: Records
    rows: range

    def tickets(self) -> Iterator[Ticket]:
        for row in self.rows:
            yield partial(Raw, self.records.where(row), partial(self.records.sample, row))


@dataclass(frozen=True)
class RowsPart:
    """One shard of a `datasets` stream, images undecoded."""

    name: str
    rows: Any
    sample: Callable[[Any], Sample]
    turn: Turn = EVERY

    def tickets(self) -> Iterator[Ticket]:
        from fsspec.asyn import reset_lock

        number = 0
        if get_worker_info() is not None:
            reset_lock()  # fsspec's, for files far away: a forked process cannot use the old one
        try:
            # By batches, as `datasets` would divide single rows among the workers once more.
            for batch in self.rows.iter(batch_size=ROWS):
                for values in zip(*batch.values(), strict=True):
                    if self.turn.takes(number):
                        row = dict(zip(batch, values, strict=True))
                        yield partial(Raw, f"{self.name}, row {number}", partial(self.sample, row))
                    number += 1
        except ValueError as error:
            reason = f"the rest of the shard cannot be read ({_first_line(error)})"
            yield partial(broken, f"{self.name}, row {number}", reason)
        except OSError as error:
            raise LostSource(f"{self.name}: cannot read on ({_first_line(error)})") from None


def lines_parts(path: Path, readers: int) -> list[Part]:
    """Cuts a JSONL file at places that no line has to be counted for; a small one is read by all,
    each in its turn."""
    file = DataFile(path)
    if file.size < readers * CHUNK:
        return [LinesPart(file, 0, file.size, turn) for turn in turns(readers)]
    count = readers * -(-file.size // (readers * CHUNK))
    cuts = [file.size * i // count for i in range(count + 1)]
    return [LinesPart(file, *cut) for cut in pairwise(cuts)]


def records_parts(records: Records, readers: int) -> list[Part]:
    """Cuts what has random access into runs of a thousand records at most."""
    count = readers * max(1, -(-len(records) // (readers * 1000)))
    cuts = [len(records) * i // count for i in range(count + 1)]
    return [RecordsPart(records, range(*cut)) for cut in pairwise(cuts)]


def rows_parts(
    name: str, rows: Any, sample: Callable[[Any], Sample], readers: int
) -> Sequence[Part]:
    """The shards of a `datasets` stream; where they are fewer than the readers, every reader reads
    all of them and takes its turn."""
    rows = rows.decode(False)
    count = rows.num_shards
    if count < readers:
        return [RowsPart(name, rows, sample, turn) for turn in turns(readers)]
    return [
        RowsPart(f"{name}, shard {i}", rows.shard(num_shards=count, index=i), sample)
        for i in range(count)
    ]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
