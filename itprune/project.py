"""The project folder: the clone whose `launch/` and `train/` run what the wheel does not hold.

Only the library is installed by pip. Commands that train find the rest beside the user: in the
working directory or above it, else where an editable install points.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

NAME = "itprune"
ENTRY = Path("launch") / "train.py"


@dataclass(frozen=True)
class Project:
    """A clone of the repository."""

    root: Path

    def script(self, name: str) -> Path:
        """`launch/NAME`.

        Raises:
            ValueError: the clone is older than this library, or not complete.
        """
        return self._file(Path("launch") / name)

    def accelerate_file(self, name: str) -> Path:
        """`launch/accelerate/NAME`.

        Raises:
            ValueError: there is no such file.
        """
        return self._file(Path("launch") / "accelerate" / name)

    def _file(self, inside: Path) -> Path:
        path = self.root / inside
        if not path.is_file():
            raise ValueError(f"{path}: is missing from the project folder; update the clone")
        return path


def find_project(start: Path | None = None) -> Project:
    """The project folder around `start` (default: the working directory), else the installed one.

    Raises:
        ValueError: there is none.
    """
    here = (start or Path()).resolve()
    installed = Path(__file__).resolve().parent.parent
    for folder in (here, *here.parents, installed):
        if is_project(folder):
            return Project(folder)
    raise ValueError(
        f"training runs from a clone of the {NAME} repository, and {here} is not inside one; "
        "change into the clone, or install it with: pip install -e 'CLONE[train]'"
    )


def is_project(folder: Path) -> bool:
    """Whether a folder is a clone of this project: it holds the entry point, and says its name."""
    described = folder / "pyproject.toml"
    if not (folder / ENTRY).is_file() or not described.is_file():
        return False
    try:
        values = tomllib.loads(described.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(values.get("project", {}).get("name") == NAME)
