"""docs/architecture.md names the files that are there: none that is gone, none of the engine's and
the top level's forgotten."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "architecture.md").read_text()


def test_the_files_named_are_the_files_there() -> None:
    section = DOCUMENT.split("## Where things are")[1].split("## ")[0]
    named = {Path(name).name for name in re.findall(r"`([\w/]+\.py)`", section)}
    library = ROOT / "itprune"
    assert named <= {path.name for path in library.rglob("*.py")}
    expected = {path.name for folder in ("engine", ".") for path in (library / folder).glob("*.py")}
    assert expected - named <= {"__init__.py", "calibration.py", "decoding.py", "records.py"}


def test_no_family_file_is_long() -> None:
    for path in (ROOT / "itprune" / "families").glob("*.py"):
        if path.name != "base.py":
            assert len(path.read_text().splitlines()) <= 150, path.name
