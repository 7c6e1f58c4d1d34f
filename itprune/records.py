"""Records of a data file: LLaVA's JSON list, or JSONL with one object a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_records(data: Path) -> list[Any]:
    """The records of a file, as they stand there.

    Raises:
        ValueError: it cannot be read, is not JSON, or holds nothing.
    """
    try:
        text = data.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{data}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{data}: not UTF-8 text") from None
    records = _list(data, text) if text.lstrip().startswith("[") else _lines(data, text)
    if not records:
        raise ValueError(f"{data}: holds no samples")
    return records


def image_names(record: Mapping[str, Any]) -> list[str]:
    """The names of a record's images; a value that is no text is left to `Question`."""
    given = record.get("images") or record.get("image") or []
    names = list(given) if isinstance(given, list) else [given]
    turns = record.get("messages") or []
    for turn in turns if isinstance(turns, list) else []:
        content = turn.get("content") if isinstance(turn, Mapping) else None
        parts = content if isinstance(content, list) else []
        names += [
            part.get("path", part.get("image"))
            for part in parts
            if isinstance(part, Mapping) and part.get("type") == "image"
        ]
    return [name for name in names if isinstance(name, str)]


def _list(data: Path, text: str) -> list[Any]:
    try:
        return list(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"{data}:{error.lineno}: not valid JSON ({error.msg})") from None


def _lines(data: Path, text: str) -> list[Any]:
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{data}:{number}: not valid JSON ({error.msg})") from None
    return records
