"""A folder of encoded questions.

rows/000001.safetensors    line 1: ids (K,), and image_0 (n, W), image_1, … in its order
requests.jsonl             {"custom_id", "method", "url", "body"}: what a vLLM server is asked
lines.jsonl                one record a line: {"line", "id"?, "file", figures} or its "error"
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors.torch import save_file
from tqdm import tqdm

from itprune.cli.question_lines import Line, QuestionLines
from itprune.serving.encoder import Encoder, Prepared, Rows
from itprune.serving.wire import Draw, Wire

ROWS = "rows"
REQUESTS = "requests.jsonl"
LINES = "lines.jsonl"


class EncodedFolder:
    """Fills a folder; use as a context manager.

    Args:
        folder: an empty one.
        wire: how a server is asked.
        draw: how it answers.
        name: what it calls its model.
    """

    def __init__(self, folder: Path, wire: Wire, draw: Draw, name: str) -> None:
        self._folder, self._wire, self._draw, self._name = folder, wire, draw, name
        self._requests = (folder / REQUESTS).open("w", encoding="utf-8")
        self._lines = (folder / LINES).open("w", encoding="utf-8")
        (folder / ROWS).mkdir()
        self.written = 0
        self.failed: list[int] = []

    def __enter__(self) -> EncodedFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._requests.close()
        self._lines.close()

    def fill(
        self, encoder: Encoder, source: QuestionLines, batch_size: int, bar: tqdm[Any]
    ) -> None:
        """Encodes lines and writes them in their order.

        Args:
            encoder: of their images.
            source: the lines.
            batch_size: lines encoded together.
            bar: moved by one for each line.
        """
        for group in _groups(source, batch_size):
            read = [_read(encoder, source, line) for line in group]
            found = iter(encoder.each([one for one in read if isinstance(one, Prepared)]))
            for line, one in zip(group, read, strict=True):
                rows = next(found) if isinstance(one, Prepared) else one
                self._note(line, rows, encoder.context, bar)
                bar.update()

    def _note(self, line: Line, rows: Rows | ValueError, context: int, bar: tqdm[Any]) -> None:
        record: dict[str, Any] = {"line": line.number}
        name = _id(line)
        if name is not None:
            record["id"] = name
        try:
            if isinstance(rows, ValueError):
                raise rows
            record.update(self._save(line.number, rows, rows.room(context)))
            self.written += 1
        except ValueError as error:
            record["error"] = str(error)
            self.failed.append(line.number)
            bar.write(f"line {line.number}: {error}", file=sys.stderr)
        self._lines.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _save(self, number: int, rows: Rows, room: int) -> dict[str, Any]:
        file = f"{ROWS}/{number:06d}.safetensors"
        images = {f"image_{i}": one.clone() for i, one in enumerate(rows.each())}
        save_file({"ids": rows.ids.clone(), **images}, self._folder / file)
        draw = replace(self._draw, max_tokens=min(self._draw.max_tokens, room))
        body = {**self._wire.ask(rows), **draw.to_body(), "model": self._name}
        request = {
            "custom_id": f"line-{number}",
            "method": "POST",
            "url": self._wire.path,
            "body": body,
        }
        self._requests.write(json.dumps(request) + "\n")
        return {
            "file": file,
            "tokens_in": rows.tokens_in,
            "tokens_kept": rows.tokens_kept,
            "visual_in": rows.visual_in,
            "visual_kept": rows.visual_kept,
        }

    def tell(self, folder: Path) -> int:
        """One line on stderr; the exit status.

        Args:
            folder: its name for people.
        """
        print(f"{folder}: {self.written} requests ({self._wire.flag})", file=sys.stderr)
        if self.failed:
            which = ", ".join(map(str, self.failed[:5])) + (", …" if len(self.failed) > 5 else "")
            print(f"{len(self.failed)} line(s) could not be encoded: {which}", file=sys.stderr)
        return 1 if self.failed and not self.written else 0


def _groups(lines: Iterable[Line], size: int) -> Iterable[list[Line]]:
    left = iter(lines)
    while group := list(itertools.islice(left, size)):
        yield group


def _read(encoder: Encoder, source: QuestionLines, line: Line) -> Prepared | ValueError:
    try:
        return encoder.prepare(source.question(line.record()))
    except ValueError as error:
        return error


def _id(line: Line) -> Any:
    try:
        record = line.record()
    except ValueError:
        return None
    return record.get("id") if isinstance(record, dict) else None
