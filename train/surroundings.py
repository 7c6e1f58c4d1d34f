"""What a run was started with: command, code, launcher and machine. No host name, no secret."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from itprune.bench.record import machine, versions
from itprune.bench.timing import Clock
from itprune.project import find_project
from train.launcher import Launch

TRAINING = ("accelerate", "deepspeed", "datasets", "bitsandbytes", "liger-kernel")
"""Packages that only training uses."""
HIDDEN = "***"
SECRET = (
    r"(?:token|secret|password|passwd|passphrase|credentials?|signature|authorization"
    r"|(?:api|access|account|private|secret)[_-]?key)"
)
"""How the name of a secret ends; `max_tokens_per_batch` is none."""
NAMED = re.compile(SECRET + "$", re.IGNORECASE)
INSIDE = (
    re.compile(r"(://)[^/\s]+(?=@)"),  # a user and a password before a host
    re.compile(  # of Hugging Face, OpenAI, GitHub, GitLab, Slack, AWS, and JSON web tokens
        r"\b()(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{20,}|gh[opsur]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
        r"|xox[abprs]-[\w-]{10,}|AKIA[A-Z0-9]{16}|eyJ[\w-]{10,}\.[\w.-]+)"
    ),
    re.compile(  # in JSON, YAML and addresses; an authorization has its kind before it
        rf"((?:{SECRET}|\bsig)[\"']?\s*[:=]\s*)"
        r"(?:(?:Bearer|Basic|Token)\s+)?(?:\"[^\"]*\"|'[^']*'|[^,}&\s\"']+)",
        re.IGNORECASE,
    ),
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
        shown.append(safe(word))
    return shown


def safe(value: Any) -> Any:
    """Plain data whose texts hold no secret: nested sections and lists are gone through."""
    if isinstance(value, str):
        for pattern in INSIDE:
            value = pattern.sub(rf"\g<1>{HIDDEN}", value)
        return value
    if isinstance(value, Mapping):
        return {
            name: HIDDEN if isinstance(one, str) and NAMED.search(str(name)) else safe(one)
            for name, one in value.items()
        }
    return [safe(one) for one in value] if isinstance(value, list | tuple) else value


def code() -> dict[str, Any]:
    """The commits of the project and of the working directory, each with whether tracked files
    have changed since; None for what is no repository, or where git is missing."""
    try:
        project = commit(find_project().root, ours=True)
    except (ValueError, OSError):  # no clone, or the working directory is gone
        project = None
    return {"project": project, "working_directory": commit(Path())}


def commit(folder: Path, ours: bool = False) -> dict[str, Any] | None:
    """The commit that is checked out in a folder.

    Args:
        folder: in a repository, or not.
        ours: whether the code at work lies there. Then it must be the repository's own folder, not
            one inside it, and may belong to another user, as in containers: git asks no repository
            of strangers, but this one's code runs anyway.

    Returns:
        {"commit", "dirty"}, or None.
    """
    options = ("-c", "safe.directory=*") if ours else ()
    about = _git(folder, *options, "rev-parse", "--show-toplevel", "HEAD")
    if about is None or len(about) != 2:
        return None
    if ours and Path(about[0]).resolve() != folder.resolve():
        return None
    changed = _git(folder, *options, "status", "--porcelain", "--untracked-files=no")
    return {"commit": about[1], "dirty": bool(changed) if changed is not None else None}


def _git(folder: Path, *words: str) -> list[str] | None:
    """The lines git prints; None where it fails. It writes nothing and starts no monitor."""
    quiet = ("--no-optional-locks", "-c", "core.fsmonitor=false")
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), *quiet, *words],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    return found.stdout.splitlines()


def software() -> dict[str, str]:
    """Versions of what a training runs on; what is not installed is left out."""
    found = versions()
    for name in TRAINING:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


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
