"""DIR/answers/RUN/: the answers of each case, kept when a run stops and goes on.

    CASE.jsonl         one line a question: its id, the answer and figures, or the error
    CASE.jsonl.rankN   what process N has answered since; appended batch by batch
    CASE.case.json     method, budget and seed; the calibration, or the reason there is no answer

`fold` joins the files of all processes, whatever their number was. Half a line, which a killed
process leaves, is cut; the last record of an id counts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any

from itprune.comparing.entries import Case
from itprune.writing import replace_text

Record = dict[str, Any]
LONGEST = 80
"""Letters of a file's name that come from a method's entry."""


class Answers:
    """The answers of one case.

    Args:
        folder: of the run; made if it is not there.
        case: the case.

    Raises:
        ValueError: the folder cannot be written.
    """

    def __init__(self, folder: Path, case: Case) -> None:
        self.case = case
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{folder}: cannot be written ({error.strerror})") from None
        self.path = folder / f"{file_name(case)}.jsonl"
        self.head_path = folder / f"{file_name(case)}.case.json"

    # ------------------------------------------------------------------------ the case
    def head(self) -> Record | None:
        """How the case runs; None where nobody has prepared it yet."""
        if not self.head_path.exists():
            return None
        try:
            return dict(json.loads(self.head_path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise ValueError(
                f"{self.head_path}: not written by `itprune eval`, so the folder is left alone; "
                "name another --output"
            ) from None

    def put_head(self, facts: Mapping[str, Any]) -> None:
        """Notes how the case runs, in one step."""
        case = self.case
        head = {"method": case.entry.label, "keep": case.keep, "seed": case.seed, **facts}
        replace_text(self.head_path, json.dumps(head, ensure_ascii=False) + "\n")

    # ------------------------------------------------------------------------ its answers
    def read(self) -> dict[str, Record]:
        """The records by id.

        Raises:
            ValueError: a file is something else.
        """
        return {record["id"]: record for path in self._files() for record in _records(path)}

    def append(self, rank: int, records: Iterable[Record]) -> None:
        """Adds the records of a batch, at once."""
        text = "".join(_line(record) for record in records)
        with self._part(rank).open("a", encoding="utf-8") as file:
            file.write(text)

    def fold(self, retry: bool = False) -> None:
        """Joins what processes have left; only one process may do it, and no other may write.

        Args:
            retry: forget what failed.
        """
        head = self.head()
        if retry and head is not None and "reason" in head:
            self.head_path.unlink()
        parts = self._parts()
        records = self.read()
        if retry:
            records = {name: r for name, r in records.items() if "error" not in r}
        if parts or retry:
            self.write(list(records.values()))
        for part in parts:
            part.unlink()

    def write(self, records: Sequence[Record]) -> None:
        """Replaces CASE.jsonl, in one step."""
        replace_text(self.path, "".join(_line(record) for record in records))

    def _files(self) -> list[Path]:
        return [self.path, *self._parts()] if self.path.exists() else self._parts()

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.rank{rank}")

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{escape(self.path.name)}.rank*"))


def file_name(case: Case) -> str:
    """A case as the name of a file; entries with odd letters get some digits to differ by."""
    label = case.entry.label
    plain = re.sub(r"[^\w.+-]+", "_", label)[:LONGEST]
    if plain != label:
        plain = f"{plain}-{hashlib.sha256(label.encode()).hexdigest()[:6]}"
    seed = "" if case.seed is None else f"-seed{case.seed}"
    return plain + ("" if case.keep == 1.0 else f"-{case.keep:g}") + seed


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _records(path: Path) -> Iterator[Record]:
    """The records of a file; an unfinished last line is left out."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return
            try:
                record = json.loads(raw)
                known = isinstance(record["id"], str) and bool({"answer", "error"} & record.keys())
            except (ValueError, TypeError, KeyError, AttributeError):
                known = False
            if not known:
                raise ValueError(
                    f"{path}: line {number} is not an answer of `itprune eval`, so the file is "
                    "left alone; name another --output"
                )
            yield record
