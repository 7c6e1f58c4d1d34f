"""The answers of a JSONL run: written line by line, continued after an interruption, in order.

A record is {"line", "key", "id"?, "answer" and figures | "error"}. `key` tells whether an answer
found in the file belongs to the line and the settings at hand. Processes that share a run each
write OUTPUT.rankN; whoever opens OUTPUT next folds what they left into it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from itprune.cli.question_lines import Line

STDOUT = "-"


@dataclass(frozen=True)
class Done:
    """A line that has been dealt with."""

    key: str
    failed: bool


class AnswerFile:
    """An open file of answers; use as a context manager.

    Attributes:
        done: line number -> what is known of it.
    """

    def __init__(self, path: Path | None, file: IO[str], whole: bool) -> None:
        self.path, self._file, self._whole = path, file, whole
        self.done: dict[int, Done] = {}
        self._in_order = True
        self._last = 0

    @classmethod
    def open(cls, name: str | None, source: Path | None, retry: bool = False) -> AnswerFile:
        """Opens OUTPUT, keeping what it holds.

        Args:
            name: the file; None or "-": stdout.
            source: the questions, which must be another file.
            retry: forget the lines that failed.

        Raises:
            ValueError: it cannot be written, or holds something else.
        """
        if name is None or name == STDOUT:
            return cls(None, sys.stdout, whole=False)
        path = Path(name)
        if source is not None and path.exists() and path.samefile(source):
            raise ValueError(f"{path}: --output is the file of the questions; name another")
        out = cls(path, _append_to(path), whole=True)
        out._read()
        out._fold()
        if retry:
            out._rewrite(lambda done: not done.failed)
        return out

    @classmethod
    def part(cls, name: str, rank: int) -> AnswerFile:
        """The part of one process of several; `done` is what OUTPUT holds already.

        Raises:
            ValueError: it cannot be written.
        """
        out = cls(Path(name), _append_to(Path(f"{name}.rank{rank}")), whole=False)
        for record, _ in _records(Path(name)):
            out._note(record)
        return out

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._whole and kind is None and not self._in_order:
            self._rewrite(lambda done: True)
        if self.path is not None:
            self._file.close()

    # ------------------------------------------------------------------------ lines and records
    def left_over(self, lines: Iterable[Line]) -> Iterator[Line]:
        """The lines that have no record yet.

        Raises:
            ValueError: a record answers another line, or was made with other settings.
        """
        for line in lines:
            found = self.done.get(line.number)
            if found is None:
                yield line
            elif found.key != line.key:
                raise ValueError(
                    f"{self.path}: its answer to line {line.number} belongs to another question "
                    "or other settings; name another --output, or delete the file to start again"
                )

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record, at once."""
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        self._note(record)

    def tell(self) -> int:
        """One line on stderr when there is something to tell; the exit status."""
        failed = sorted(number for number, done in self.done.items() if done.failed)
        answers = len(self.done) - len(failed)
        if self.path is not None:
            print(f"{self.path}: {answers} answers", file=sys.stderr)
        if failed:
            which = ", ".join(map(str, failed[:5])) + (", …" if len(failed) > 5 else "")
            print(f"{len(failed)} line(s) could not be answered: {which}", file=sys.stderr)
        return 1 if failed and not answers else 0

    def _note(self, record: dict[str, Any]) -> None:
        number = record["line"]
        self.done[number] = Done(record["key"], "error" in record)
        self._in_order &= number > self._last
        self._last = number

    # ------------------------------------------------------------------------ what is there
    def _read(self) -> None:
        """Notes the records; cuts off one that a crash left half written."""
        assert self.path is not None
        whole = 0
        for record, end in _records(self.path):
            self._note(record)
            whole = end
        if whole < self.path.stat().st_size:
            os.truncate(self.path, whole)

    def _fold(self) -> None:
        """Takes over what processes of an interrupted run wrote."""
        assert self.path is not None
        for part in sorted(self.path.parent.glob(f"{escape(self.path.name)}.rank*")):
            for record, _ in _records(part):
                if record["line"] not in self.done:
                    self.write(record)
            os.fsync(self._file.fileno())
            part.unlink()

    def _rewrite(self, wanted: Callable[[Done], bool]) -> None:
        """Replaces the file by its wanted records in the order of lines, in one step."""
        assert self.path is not None
        records = {r["line"]: r for r, _ in _records(self.path)}
        partial = self.path.with_name(f"{self.path.name}.partial")
        self.done, self._in_order, self._last = {}, True, 0
        with partial.open("w", encoding="utf-8") as file:
            for _, record in sorted(records.items()):
                if wanted(Done(record["key"], "error" in record)):
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    self._note(record)
        self._file.close()
        os.replace(partial, self.path)
        self._file = self.path.open("a", encoding="utf-8")


def _append_to(path: Path) -> IO[str]:
    try:
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from None


def _records(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The records of a file, each with the offset of its end; an unfinished last line is left out.

    Raises:
        ValueError: the file is something else.
    """
    end = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            end += len(raw)
            if not raw.endswith(b"\n"):
                return
            try:
                record = json.loads(raw)
                known = isinstance(record["line"], int) and isinstance(record["key"], str)
            except (ValueError, TypeError, KeyError):
                known = False
            if not known:
                raise ValueError(
                    f"{path}: line {number} is not an answer of `itprune infer`, so the file is "
                    "left alone; name another --output"
                )
            yield record, end
