"""The commands of a Markdown page, as people copy them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tests.lmms.inside import ROOT

PAGE = ROOT / "docs" / "serve_vllm.md"


def commands(text: str) -> list[list[str]]:
    """The words of every command in its blocks of bash."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def documented(*start: str, page: Path = PAGE) -> list[list[str]]:
    """The page's commands that begin so."""
    found = [c for c in commands(page.read_text()) if tuple(c[: len(start)]) == start]
    assert found, f"{page}: no command begins with {' '.join(start)}"
    return found
