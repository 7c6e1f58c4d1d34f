"""DataFile: parts of a file that is too large to hold, read where they lie.

Reading at a place keeps no position, so processes share the file; nothing of it stays in memory,
where the touched pages of a memory map would count as this process's; and a file that was cut short
is an error instead of a signal that ends the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from train.data.sample import LostSource

CHUNK = 4 * 1024 * 1024
"""Bytes looked through at once."""
SHORT = 64
"""Bytes of a line that is looked at more closely, as it may be blank; no record is as short."""
BOM = b"\xef\xbb\xbf"


class DataFile:
    """A file as it was when it was opened first; copies in other processes open it anew.

    Raises:
        ValueError: no such file, or one that may not be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None
        try:
            self._stamp = _stamp(self._opened())
        except OSError as error:
            raise ValueError(f"{path}: cannot read the data ({error.strerror})") from None

    @property
    def size(self) -> int:
        """Bytes."""
        return self._stamp[0]

    def read(self, start: int, end: int) -> bytes:
        """Bytes from `start` up to `end`.

        Raises:
            LostSource: the file has changed or can no longer be read.
        """
        try:
            file = self._opened()
            data = os.pread(file.fileno(), end - start, start)
            changed = _stamp(file) != self._stamp
        except OSError as error:
            raise LostSource(f"{self.path}: cannot read the data ({error.strerror})") from None
        if changed or len(data) < end - start:
            raise LostSource(f"{self.path}: has changed since this run opened it; start it anew")
        return data

    def chunks(self, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        """The part from `start` to `end`, a few megabytes at a time, with the place of each."""
        for place in range(start, end, CHUNK):
            yield place, self.read(place, min(place + CHUNK, end))

    def lines_before(self, place: int) -> int:
        """Line breaks before a byte."""
        return sum(chunk.count(b"\n") for _, chunk in self.chunks(0, place))

    def text_start(self) -> int:
        """Where the text begins: behind the mark that some editors write."""
        return len(BOM) if self.read(0, min(self.size, len(BOM))) == BOM else 0

    def _opened(self) -> FileIO:
        if self._file is None:
            self._file = FileIO(self.path)
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


class Lines:
    """The lines of a file that are not blank; 8 bytes of memory each."""

    def __init__(self, path: Path) -> None:
        self.file = DataFile(path)
        breaks = [np.array([self.file.text_start()])]
        for place, chunk in self.file.chunks(0, self.file.size):
            found = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n"))
            breaks.append(found + (place + 1))
        if breaks[-1].size == 0 or breaks[-1][-1] != self.file.size:
            breaks.append(np.array([self.file.size + 1]))  # the last line has no break
        self._starts = np.concatenate(breaks)
        del breaks
        lengths = np.diff(self._starts) - 1
        blank = [i for i in np.flatnonzero(lengths <= SHORT) if not self._line(int(i)).strip()]
        self._rows = np.delete(np.arange(len(lengths)), blank) if blank else None

    def __len__(self) -> int:
        return len(self._starts) - 1 if self._rows is None else len(self._rows)

    def number(self, index: int) -> int:
        """Number of the line in the file, from 1 on, blank ones included."""
        return self._row(index) + 1

    def __getitem__(self, index: int) -> bytes:
        return self._line(self._row(index))

    def _row(self, index: int) -> int:
        return index if self._rows is None else int(self._rows[index])

    def _line(self, row: int) -> bytes:
        return self.file.read(int(self._starts[row]), int(self._starts[row + 1]) - 1)


def _stamp(file: FileIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns
