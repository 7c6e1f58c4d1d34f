"""DIR/rows.jsonl: one line for every finished case, kept when a run stops and goes on.

A line is {"key", "method", "keep", "seed", "model", "data", "answers" or "reason", "time"}. It is
appended as soon as a case is answered and once more when it is timed; the last line of a key
counts, and `settle` leaves one line a key.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from itprune.writing import replace_text

FILE = "rows.jsonl"
Row = dict[str, Any]


class Rows:
    """The rows of a folder.

    Args:
        folder: made if it is not there.

    Raises:
        ValueError: it cannot be written, or its rows.jsonl is something else.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        except OSError as error:
            raise ValueError(f"{folder}: cannot be written ({error.strerror})") from None
        self.rows: dict[str, Row] = {}
        self._read()

    def __getitem__(self, key: str) -> Row:
        return self.rows[key]

    def get(self, key: str) -> Row | None:
        """The row of a key, if there is one."""
        return self.rows.get(key)

    def put(self, row: Row) -> None:
        """Adds or replaces a row, at once."""
        self.rows[row["key"]] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def settle(self) -> None:
        """One line a key, in one step."""
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows.values())
        replace_text(self.path, "".join(lines))

    def _read(self) -> None:
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        for number, line in enumerate(raw[:whole].splitlines(), 1):
            row = _row(line)
            if row is None:
                raise ValueError(
                    f"{self.path}: line {number} is not a row of `itprune compare`, so the file is "
                    "left alone; name another --output"
                )
            self.rows[row["key"]] = row
        if whole < len(raw):  # a crash left half a line
            os.truncate(self.path, whole)


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    known = isinstance(row, dict) and isinstance(row.get("key"), str) and "method" in row
    return row if known else None
