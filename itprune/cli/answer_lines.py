"""Answers lines in batches. A bad line becomes an error record and costs the others nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from itprune.answer import Answer, Answerer, Encoded
from itprune.cli.question_lines import Line, QuestionLines

Write = Callable[[dict[str, Any]], None]


@dataclass
class Entry:
    """A line on its way: encoded, or refused."""

    record: dict[str, Any]
    encoded: Encoded | None = None


def answer_lines(
    answerer: Answerer,
    lines: Iterable[Line],
    source: QuestionLines,
    write: Write,
    batch_size: int,
    bar: tqdm[Any],
) -> None:
    """Answers lines and writes one record each, in their order.

    Args:
        answerer: the model.
        lines: those to answer.
        source: where they come from, which reads them.
        write: takes a record.
        batch_size: lines answered together.
        bar: moved by one for each line.
    """
    waiting: list[Entry] = []
    ready = 0
    for line in lines:
        entry = _read(answerer, source, line)
        waiting.append(entry)
        ready += entry.encoded is not None
        if ready == batch_size:
            _finish(answerer, waiting, write, bar)
            waiting, ready = [], 0
    _finish(answerer, waiting, write, bar)


def _read(answerer: Answerer, source: QuestionLines, line: Line) -> Entry:
    entry = Entry({"line": line.number, "key": line.key})
    try:
        record = line.record()
        if isinstance(record, dict) and record.get("id") is not None:
            entry.record["id"] = record["id"]
        entry.encoded = answerer.encode(source.question(record))
    except ValueError as error:
        entry.record["error"] = str(error)
    return entry


def _finish(answerer: Answerer, entries: Sequence[Entry], write: Write, bar: tqdm[Any]) -> None:
    found = iter(_answer(answerer, [e.encoded for e in entries if e.encoded is not None]))
    for entry in entries:
        if entry.encoded is not None:
            result = next(found)
            entry.record.update(result if isinstance(result, dict) else result.to_dict())
        if "error" in entry.record:
            bar.write(f"line {entry.record['line']}: {entry.record['error']}", file=sys.stderr)
        write(entry.record)
        bar.update()


def _answer(answerer: Answerer, batch: Sequence[Encoded]) -> list[Answer | dict[str, str]]:
    """One result each. Questions that fail together are asked alone, so that one is to blame."""
    if not batch:
        return []
    try:
        return list(answerer.answer(batch))
    except ValueError as error:
        if len(batch) == 1:
            return [{"error": str(error)}]
        return [result for one in batch for result in _answer(answerer, [one])]
