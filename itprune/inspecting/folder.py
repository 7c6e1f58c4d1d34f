"""Folder: where an inspection is written, and which files in it are ours to replace."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

FIGURES, PAGE = "inspect.json", "index.html"
MAKER = "itprune inspect"
OURS = re.compile(r"inspect\.json|index\.html|kept-\d{3,}(-[a-z0-9]+)*\.png")
"""Names this command writes, and so replaces in a folder of its own."""


class OutputFolder:
    """An output folder. Making one checks it; nothing is changed before `open`.

    Args:
        path: a new or empty folder, or one that an earlier call wrote.

    Raises:
        ValueError: it holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise ValueError(f"--output {path}: is a file; name a folder")
        if path.is_dir() and any(path.iterdir()) and not self._is_ours():
            raise ValueError(
                f"--output {path}: holds files this command did not write; name a new folder"
            )

    def _is_ours(self) -> bool:
        try:
            values = json.loads((self.path / FIGURES).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(values, dict) and values.get("made_by") == MAKER

    def open(self) -> None:
        """Makes the folder, and takes away what an earlier call wrote.

        Raises:
            ValueError: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for file in self.path.iterdir():
                if OURS.fullmatch(file.name) and not file.is_dir():
                    file.unlink()
            self.write_figures({})  # first: a call that is stopped leaves a folder of ours
        except OSError as error:
            raise ValueError(
                f"--output {self.path}: cannot be written ({error.strerror})"
            ) from None

    def write_picture(self, name: str, picture: Image.Image) -> None:
        """Writes `name`, a PNG."""
        picture.save(self.path / name, optimize=True)

    def write_figures(self, figures: Mapping[str, Any]) -> None:
        """Writes inspect.json, by which the folder is known to be ours."""
        text = json.dumps({"made_by": MAKER, **figures}, indent=1, ensure_ascii=False)
        (self.path / FIGURES).write_text(text + "\n", encoding="utf-8", errors="replace")

    def write_page(self, text: str) -> Path:
        """Writes index.html."""
        (self.path / PAGE).write_text(text, encoding="utf-8", errors="replace")
        return self.path / PAGE
