"""LLaVA JSON: a list of {"id", "image": path or list, "conversations": [{"from", "value"}]}.

The public instruction files are a gigabyte of JSON. Keeping them as Python objects costs several
times that in every process, so the file's bytes are kept with each record's span, and a record is
parsed when it is asked for.
"""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

from train.data.sample import BadSample, Sample, Turn, image_list, role_of, split_text

SPACE = " \t\r\n"


class LlavaRecords:
    """Random access to the records of a LLaVA JSON file.

    Raises:
        ValueError: no such file, or a syntax error at line n.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes, self._ends = _scan(path, read_text(path))

    def __len__(self) -> int:
        return len(self._ends)

    def where(self, index: int) -> str:
        return f"{self.path}, record {index}"

    def sample(self, index: int) -> Sample:
        start = self._ends[index - 1] if index else 0
        return llava_sample(json.loads(self._bytes[start : self._ends[index]]))


def llava_sample(record: Any) -> Sample:
    """Turns one LLaVA record into a sample."""
    if not isinstance(record, dict):
        raise BadSample(f"a record must be an object, got {type(record).__name__}")
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadSample("`conversations` must be a list of {from, value}")
    return Sample(
        tuple(Turn(role_of(turn.get("from")), split_text(turn.get("value"))) for turn in turns),
        image_list(record.get("image")),
    )


def read_text(path: Path) -> str:
    """The text of a data file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot read the data ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None


def _scan(path: Path, text: str) -> tuple[bytes, array[int]]:
    """The records' bytes one after another, and where each ends."""
    decoder = json.JSONDecoder()
    records, ends = bytearray(), array("q")
    position = _skip(text, 0)
    if text[position : position + 1] != "[":
        raise ValueError(f"{path}: a LLaVA file must be one JSON list of records")
    position = _skip(text, position + 1)
    closed = text[position : position + 1] == "]"
    while not closed:
        try:
            _, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
        records += text[position:end].encode()
        ends.append(len(records))
        position = _skip(text, end)
        closed = text[position : position + 1] == "]"
        if not closed:
            if text[position : position + 1] != ",":
                line = text.count("\n", 0, position) + 1
                raise ValueError(f"{path}:{line}: not valid JSON (expected , or ])")
            position = _skip(text, position + 1)
    if _skip(text, position + 1) != len(text):
        line = text.count("\n", 0, position) + 1
        raise ValueError(f"{path}:{line}: not valid JSON (text after the closing ])")
    return bytes(records), ends


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in SPACE:
        position += 1
    return position
