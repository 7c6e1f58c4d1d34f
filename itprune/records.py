"""JSON of data files: read whole, as LLaVA's list, or as JSONL with one object a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")
"""How gzip, zip, zstd, bzip2 and xz files begin."""


def read_records(data: Path) -> list[Any]:
    """The records of a file, as they stand there.

    Raises:
        ValueError: it cannot be read, is not JSON, or holds nothing.
    """
    text = read_text(data)
    if text.lstrip().startswith("["):
        records = list(parse(data, text))
    else:
        lines = enumerate(text.split("\n"), 1)
        records = [parse(data, line, number) for number, line in lines if line.strip()]
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


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        ValueError: it cannot be read, or is not JSON.
    """
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path}: is empty")
    return parse(path, text)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without the mark that some editors write in front.

    Raises:
        ValueError: it cannot be read, or is something else.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise not_text(path, content) from None


def not_text(path: Path, start: bytes) -> ValueError:
    """What to raise for a file that is no text.

    Args:
        path: the file.
        start: how it begins.
    """
    if start.startswith(COMPRESSED):
        return ValueError(f"{path}: is compressed; unpack it first")
    return ValueError(f"{path}: not UTF-8 text")


def parse(path: Path, text: str, first: int = 1) -> Any:
    """The value of a piece of JSON.

    Args:
        path: where it stands.
        text: the piece.
        first: number of its first line.

    Raises:
        ValueError: it is not JSON, or nothing that Python can hold.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where, reason = first + error.lineno - 1, error.msg
    except RecursionError:
        where, reason = first, "lists or objects too deep inside each other"
    except ValueError:
        where, reason = first, "a number of too many digits"
    raise ValueError(f"{path}:{where}: not valid JSON ({reason})")
