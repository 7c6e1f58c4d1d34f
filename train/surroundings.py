"""What a run was started with: command, code, launcher and machine. No host name, no secret."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from itprune.bench.record import machine
from itprune.bench.timing import Clock
from itprune.project import find_project
from train.launcher import Launch

HIDDEN = "***"
NAMED = re.compile(r"(token|secret|password|passwd|api[_-]?key|credentials?)$", re.IGNORECASE)
"""How the name of a secret ends; `max_tokens_per_batch` is none."""
INSIDE = (
    re.compile(r"(://)[^/\s@]+(?=@)"),  # a user and a password before a host
    re.compile(r"\b()(?:hf|sk|gh[opsu]|github_pat|glpat)[_-][A-Za-z0-9_-]{12,}"),
    re.compile(r"((?:token|secret|password|_key)[\"']?:\s*)[^,}\s]+", re.IGNORECASE),
)
"""Secrets inside a word, whatever its name; what stands before them stays."""
PATIENCE = 10
"""Seconds that git may take."""


def without_secrets(words: Sequence[str]) -> list[str]:
    """A command line whose tokens and passwords are hidden."""
    shown: list[str] = []
    for word in words:
        name, equals, _ = word.partition("=")
        before = shown[-1] if shown else ""
        if equals and NAMED.search(name):
            word = f"{name}={HIDDEN}"
        elif before.startswith("--") and "=" not in before and NAMED.search(before):
            word = HIDDEN
        for pattern in INSIDE:
            word = pattern.sub(rf"\g<1>{HIDDEN}", word)
        shown.append(word)
    return shown


def code() -> dict[str, Any]:
    """The commits of the project and of the working directory, each with whether tracked files
    have changed since; None for what is no repository, or where git is missing."""
    try:
        project = commit(find_project().root, top=True)
    except (ValueError, OSError):  # no clone, or the working directory is gone
        project = None
    return {"project": project, "working_directory": commit(Path())}


def commit(folder: Path, top: bool = False) -> dict[str, Any] | None:
    """The commit that is checked out in a folder.

    Args:
        folder: in a repository, or not.
        top: whether it must be the repository's own folder, not one inside it.

    Returns:
        {"commit", "dirty"}, or None.
    """
    about = _git(folder, "rev-parse", "--show-toplevel", "HEAD")
    if about is None or len(about) != 2:
        return None
    if top and Path(about[0]).resolve() != folder.resolve():
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": about[1], "dirty": bool(changed) if changed is not None else None}


def _git(folder: Path, *words: str) -> list[str] | None:
    """The lines git prints; None where it fails. It writes nothing and starts no monitor."""
    quiet = ("--no-optional-locks", "-c", "core.fsmonitor=false")
    try:
        found = subprocess.run(
            ["git", *quiet, "-C", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    return found.stdout.splitlines()


def launcher(launch: Launch, env: Mapping[str, str] = os.environ) -> str:
    """What started the processes."""
    if launch.by_deepspeed:
        return "deepspeed"
    if "ACCELERATE_MIXED_PRECISION" in env:
        return "accelerate"
    return "torchrun" if "TORCHELASTIC_RUN_ID" in env else "python"


def place(device: torch.device) -> dict[str, Any]:
    """Rank 0's device, processor and system; the other processes are taken to have the same."""
    return machine(Clock(device, torch.get_num_threads()))
