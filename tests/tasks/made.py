"""Files of benchmarks, written by hand and small enough to score with a pencil."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from itprune.tasks import find_task
from itprune.tasks.base import Task


def png(colour: int = 0) -> bytes:
    """A picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def picture(path: Path, colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(colour))
    return path


def json_file(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def lines_file(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(name: str, files: Path | list[Path], root: Path | None = None, **options: str) -> Task:
    """A benchmark of files."""
    return find_task(name).read(files if isinstance(files, list) else [files], root, options)


def refused(name: str, files: Path | list[Path], message: str, **options: str) -> None:
    """Reading says `message`, in one line."""
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(name, files, **options)
    assert "\n" not in str(caught.value)


def total(task: Task, answers: Mapping[str, str]) -> dict[str, float]:
    """The figures of answers by the items' ids."""
    items = [item for item in task.items if item.id in answers]
    return task.total(items, [task.score(item, answers[item.id]) for item in items])
