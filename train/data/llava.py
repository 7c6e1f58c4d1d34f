"""LLaVA JSON: a list of {"id", "image": path or list, "conversations": [{"from", "value"}]}.

The public instruction files are a gigabyte of JSON and more. The file is looked through once, a
few megabytes at a time, so that a syntax error is told at once; kept is where each record lies, and
a record is read when it is asked for.
"""

from __future__ import annotations

import codecs
import json
import re
from array import array
from pathlib import Path
from typing import Any, NoReturn

from train.data.files import CHUNK, DataFile
from train.data.sample import BadSample, Sample, Turn, image_list, role_of, split_text

SPACE = re.compile(r"[ \t\r\n]*")
BETWEEN = re.compile(r"[ \t\r\n]*,[ \t\r\n]*(?=[^ \t\r\n])")
DECODER = json.JSONDecoder()
SCALAR = 32
"""Characters at the end of a text that may be the beginning of a number, word or escape."""


class LlavaRecords:
    """Random access to the records of a LLaVA JSON file.

    Raises:
        ValueError: no such file, or a syntax error at line n.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = DataFile(path)
        self._spans = _Scan(self._file).spans()

    def __len__(self) -> int:
        return len(self._spans) // 2

    def where(self, index: int) -> str:
        return f"{self.path}, record {index}"

    def sample(self, index: int) -> Sample:
        start, end = self._spans[2 * index : 2 * index + 2]
        return llava_sample(json.loads(self._file.read(start, end)))


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


class _Scan:
    """Finds the records of a file through a window of text that moves along."""

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self.text, self.at = "", 0
        self._read = self._place = file.text_start()  # bytes read; place of the next character
        self._left = b""  # the beginning of a character that the next bytes complete

    def spans(self) -> array[int]:
        """First byte and end of each record, one after the other."""
        spans = array("q")
        if self._next() != "[":
            raise ValueError(f"{self.file.path}: a LLaVA file must be one JSON list of records")
        self._pass(1)
        closed = self._next() == "]"
        while not closed:
            end = self._record()
            spans.append(self._place)
            self._pass(end - self.at)
            spans.append(self._place)
            between = BETWEEN.match(self.text, self.at)
            if between is not None:  # nearly always, and in one go
                self._pass(between.end() - self.at)
                continue
            mark = self._next()
            if mark not in ("]", ","):
                self._refuse(self._place, "expected , or ]")
            closed = mark == "]"
            if not closed:
                self._pass(1)
                self._next()
        self._pass(1)
        if self._next():
            self._refuse(self._place, "text after the closing ]")
        return spans

    def _record(self) -> int:
        """The end of the value that begins here, in characters of the window."""
        while True:
            try:
                _, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                place = self._place_of(error.pos)
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - SCALAR
                if not cut or not self._more(len(self.text)):
                    self._refuse(place, error.msg)
            except RecursionError:
                self._refuse(self._place, "nested too deeply")
            except ValueError:  # of int(), which takes no more digits
                self._refuse(self._place, "a number is too long")
            else:
                if end < len(self.text) or not self._more(CHUNK):
                    return end

    def _next(self) -> str:
        """Moves to the next character that is no space, and returns it; empty at the end."""
        while True:
            self._pass(SPACE.match(self.text, self.at).end() - self.at)  # type: ignore[union-attr]
            if self.at < len(self.text) or not self._more(CHUNK):
                return self.text[self.at : self.at + 1]

    def _pass(self, count: int) -> None:
        self._place = self._place_of(self.at + count)
        self.at += count

    def _place_of(self, at: int) -> int:
        return self._place + len(self.text[self.at : at].encode())

    def _more(self, size: int) -> bool:
        """Drops what has been passed and reads at least `size` bytes on; False at the end."""
        end = min(self._read + max(size, CHUNK), self.file.size)
        data = self._left + self.file.read(self._read, end)
        try:
            text, used = codecs.utf_8_decode(data, "strict", end == self.file.size)
        except UnicodeDecodeError:
            raise ValueError(f"{self.file.path}: not UTF-8 text") from None
        self._left, self._read = data[used:], end
        self.text, self.at = self.text[self.at :] + text, 0
        return bool(data)

    def _refuse(self, place: int, reason: str) -> NoReturn:
        line = self.file.lines_before(place) + 1
        raise ValueError(f"{self.file.path}:{line}: not valid JSON ({reason})")
