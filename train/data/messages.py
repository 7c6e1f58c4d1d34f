"""JSONL with {"messages": [{"role", "content"}], "images": [paths]}, one record a line.

`content` is text with `<image>` places, or a list of {"type": "text", "text"} and
{"type": "image"}. A line may also be a LLaVA record. A line that is not JSON is one bad sample.
A file may hold many gigabytes: only the places of its lines are kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from itprune.question import IMAGE
from train.data.files import Lines
from train.data.llava import llava_sample
from train.data.sample import (
    BadSample,
    Sample,
    Turn,
    check_text,
    image_list,
    role_of,
    split_text,
)


class JsonlRecords:
    """Random access to the lines of a JSONL file; empty lines do not count.

    Raises:
        ValueError: no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = Lines(path)

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, index: int) -> str:
        return f"{self.path}:{self._lines.number(index)}"

    def sample(self, index: int) -> Sample:
        return line_sample(self._lines[index])


def line_sample(line: bytes) -> Sample:
    """The sample of one line."""
    return record_sample(json_record(line))


def json_record(data: bytes) -> Any:
    """The value that bytes of JSON stand for."""
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadSample("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise BadSample(f"not valid JSON ({error.msg} at column {error.colno})") from None
    except ValueError:  # of int(), which takes no more digits
        raise BadSample("not valid JSON (a number is too long)") from None
    except RecursionError:
        raise BadSample("not valid JSON (nested too deeply)") from None


def record_sample(record: Any) -> Sample:
    """Turns a record of either layout into a sample."""
    if not isinstance(record, dict):
        raise BadSample(f"a record must be an object, got {type(record).__name__}")
    if record.get("messages") is None:
        if record.get("conversations") is None:
            raise BadSample("neither `messages` nor `conversations` in the record")
        return llava_sample(record)
    messages = record["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise BadSample("`messages` must be a list of {role, content}")
    images = record.get("images")
    if images is None:
        images = record.get("image")
    turns = tuple(Turn(role_of(m.get("role")), _parts(m.get("content"))) for m in messages)
    return Sample(turns, image_list(images))


def _parts(content: Any) -> tuple[str, ...]:
    if not isinstance(content, list):
        return split_text(content)
    parts: list[str] = []
    for item in content:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "image":
            parts.append(IMAGE)
        elif kind == "text" and isinstance(item.get("text"), str):
            if IMAGE in item["text"]:
                raise BadSample(f"{IMAGE} inside a text item; write an item of type image")
            check_text(item["text"])
            parts.append(item["text"])
        else:
            raise BadSample("a content item must be {type: text, text} or {type: image}")
    return tuple(parts)
