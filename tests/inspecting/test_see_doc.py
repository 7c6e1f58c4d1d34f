"""docs/see.md: its first command runs as written, and its pictures are small."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from tests.inspecting.conftest import inspect

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "see.md").read_text(encoding="utf-8")


def test_the_first_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)[0]
    program, command, *words = shlex.split(block.replace("\\\n", " "))
    assert (program, command) == ("itprune", "inspect")
    monkeypatch.chdir(ROOT)
    words[words.index("build/see")] = str(tmp_path / "see")
    assert inspect(*words) == 0
    page = (tmp_path / "see" / "index.html").read_text(encoding="utf-8")
    assert "<s>" in page  # words of this prompt are dropped, as on the picture


def test_pictures_are_there_and_small() -> None:
    for name in ["see_scene.png", *re.findall(r"\]\(([a-z_]+\.jpg)\)", TEXT)]:
        assert os.path.getsize(ROOT / "docs" / name) < 200_000


def test_links_lead_somewhere() -> None:
    for name in re.findall(r"\]\(([a-z_-]+\.md)\)", TEXT):
        assert (ROOT / "docs" / name).exists()
