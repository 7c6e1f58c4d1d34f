"""The lines of a JSONL file of questions, with what identifies each for an interrupted run."""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itprune.checkpoint import PRUNER_FILE
from itprune.decoding import Decoding
from itprune.question import ImageFolder, Question

STDIN = "-"


@dataclass(frozen=True)
class Line:
    """One line that is not blank."""

    number: int
    """From 1, blank lines counted."""
    raw: bytes
    key: str
    """Fingerprint of the line and of the run's settings."""

    def record(self) -> Any:
        """The JSON value.

        Raises:
            ValueError: it is not JSON.
        """
        try:
            return json.loads(self.raw.decode("utf-8"))
        except UnicodeDecodeError:
            raise ValueError("not UTF-8 text") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"not valid JSON ({error.msg} at column {error.colno})") from None
        except RecursionError:
            raise ValueError("not a question (brackets within brackets without end)") from None


class QuestionLines:
    """A file of questions, or stdin. Iterating gives its lines.

    Args:
        path: the file; None: stdin, which can be gone through once.
        root: the folder of its images.
        settings: everything that changes answers, for the lines' keys.

    Raises:
        ValueError: no such file, or a JSON list in place of lines.
    """

    def __init__(self, path: Path | None, root: Path, settings: str) -> None:
        self.path = path
        self.open_image = ImageFolder(root)
        self._seed = zlib.crc32(settings.encode())
        if path is not None:
            _check_file(path)

    @classmethod
    def from_options(
        cls,
        args: argparse.Namespace,
        decoding: Decoding,
        more: Mapping[str, Any] | None = None,
    ) -> QuestionLines:
        """From the options of `itprune infer`.

        Args:
            args: the options.
            decoding: how answers are drawn.
            more: what else changes answers.
        """
        path = None if args.jsonl == STDIN else Path(args.jsonl)
        folder = Path() if path is None else path.parent
        pruner = Path(args.model) / PRUNER_FILE
        settings = {
            "model": str(Path(args.model).resolve()),
            "pruner": pruner.read_text(encoding="utf-8") if pruner.exists() else None,
            "keep": args.keep,
            "method": args.method,
            "dtype": args.dtype,
            **decoding.to_dict(),
            **(more or {}),
        }
        root = folder if args.image_root is None else Path(args.image_root)
        if not root.is_dir():
            raise ValueError(f"--image-root {root}: no such folder")
        return cls(path, root, json.dumps(settings))

    def __iter__(self) -> Iterator[Line]:
        for number, raw in enumerate(self._raw(), 1):
            text = raw.strip()
            if text:
                yield Line(number, text, f"{zlib.crc32(text, self._seed):08x}")

    def _raw(self) -> Iterator[bytes]:
        if self.path is None:
            for line in sys.stdin:
                yield line.encode("utf-8", "surrogateescape")
            return
        with self.path.open("rb") as file:
            yield from file

    def count(self) -> int | None:
        """How many lines there are; None: stdin does not tell."""
        return None if self.path is None else sum(1 for _ in self)

    def question(self, record: Any) -> Question:
        """The question of a record, its images opened.

        Raises:
            ValueError: what is wrong with it.
        """
        return Question.from_record(record, self.open_image)


def _check_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(4096).lstrip()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if start.startswith(b"["):
        raise ValueError(
            f"{path}: a JSON list, but --jsonl takes one object a line; "
            f"convert it with: jq -c '.[]' {path} > {path.stem}.jsonl"
        )
