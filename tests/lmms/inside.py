"""Makes the environment lmms-eval runs in: its own packages before those of this one.

torch and transformers are taken from the running environment, so that an install takes seconds.
lmms-eval goes in without what it asks for and a task of pictures does not import
(constraints-lmms.txt), itprune as a package of its own, as from a wheel.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ROOT / "constraints-lmms.txt"
LIMIT = 600
"""Seconds of one program."""


@dataclass(frozen=True)
class Inside:
    """The environment, and a working directory with data/scenes."""

    folder: Path
    work: Path

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    def run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Runs a program of the environment, without a network and with caches of its own."""
        variables = {
            **os.environ,
            "HF_HOME": str(self.work / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "NO_COLOR": "1",
        }
        return subprocess.run(
            command, cwd=cwd or self.work, env=variables, capture_output=True, text=True,
            timeout=LIMIT, check=False,
        )  # fmt: skip


def make(folder: Path, work: Path) -> Inside:
    """The environment; the test is skipped where packages cannot be had."""
    venv.create(folder, with_pip=False, symlinks=True)
    inside = Inside(folder, work)
    outer = [path for path in site.getsitepackages() if path.startswith(sys.prefix)]
    library = next((folder / "lib").glob("python*/site-packages"))
    lines = [f"import site; site.addsitedir({path!r})" for path in outer]
    (library / "outer.pth").write_text("\n".join(lines) + "\n")
    status, told = install(inside, ["-r", str(PACKAGES)])
    if status:
        pytest.skip(f"lmms-eval's packages cannot be had: {told}")
    status, told = install(inside, ["--no-build-isolation", str(copy_source(work))])
    assert status == 0, told
    return inside


def copy_source(work: Path) -> Path:
    """A copy of what a wheel is made of: building leaves files behind."""
    copy = work / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(
        ROOT / "itprune", copy / "itprune", ignore=shutil.ignore_patterns("__pycache__")
    )
    return copy


def install(inside: Inside, words: Sequence[str]) -> tuple[int, str]:
    """Installs packages, nothing they ask for: exit status, and the last line of what is told."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", inside.python, "install", "--quiet", "--no-deps",
         "--disable-pip-version-check", *words],
        capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if "WARNING" not in line] or [""]
    return done.returncode, lines[-1]
