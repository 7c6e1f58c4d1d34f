"""Faults: what can go wrong under way, each told in one sentence with what is kept.

An exception that is known here is about the machine, the files or the other processes, where a
stack trace would say nothing. Every other one keeps its trace.
"""

from __future__ import annotations

import errno
import pickle
import shutil
import signal
import sys
import threading
import traceback
import zipfile
from pathlib import Path

from safetensors import SafetensorError
from torch import distributed, serialization

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DAMAGED = (SafetensorError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile)
INTERRUPTED = 130
"""Exit status of a process ended from the keyboard."""


class Fault(Exception):
    """What ended a run, in a sentence.

    Args:
        sentence: what, where, what is kept, what to do.
        status: exit status of the process.
        shared: whether all processes say the same, so that one is enough.
    """

    def __init__(self, sentence: str, status: int = 1, shared: bool = False) -> None:
        super().__init__(sentence)
        self.status = status
        self.shared = shared


def told(error: BaseException) -> tuple[str | None, int, bool]:
    """How an exception that ends the program is told.

    Returns:
        A sentence, or None where a stack trace says more; the exit status; whether all processes
        say the same.
    """
    if isinstance(error, Fault):
        return str(error), error.status, error.shared
    if isinstance(error, ValueError):
        return str(error), 2, False
    if isinstance(error, KeyboardInterrupt):
        return "interrupted before training began", INTERRUPTED, True
    if isinstance(error, OSError):
        return first_line(error), 1, False
    return None, 1, False


def lost_worker(error: BaseException, fetching: bool) -> bool:
    """Whether a process that reads data is gone.

    Args:
        error: what was raised, by torch or, if a batch was on its way, by the connection to it.
        fetching: whether a batch was waited for.
    """
    message = str(error)
    if isinstance(error, RuntimeError) and message.startswith("DataLoader worker (pid"):
        return True
    broken = isinstance(error, ConnectionError | EOFError)
    return fetching and broken and not message.startswith("Caught")  # by a worker that lives


def forget_children() -> None:
    """The end of a data worker is no news once a run is ending: torch would raise it anywhere."""
    if threading.current_thread() is threading.main_thread() and sys.platform != "win32":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed: another process is gone, or did not come in time."""
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and "/gloo/" in str(error)


def damaged(error: BaseException) -> bool:
    """Whether a file of weights or of a state could not be read."""
    return isinstance(error, DAMAGED) or _of_torch_file(error)


def not_written(error: BaseException, output: Path) -> str | None:
    """Why a file could not be written, or None where that is not the matter.

    Libraries tell of a full disk in their own words, some without the reason.
    """
    if isinstance(error, OSError):
        reason = str(error.strerror or error) + (f": {error.filename}" if error.filename else "")
    elif isinstance(error, SafetensorError):
        reason = first_line(error)
    elif _of_torch_file(error):
        reason = "a file could not be written to its end"
    else:
        return None
    free = shutil.disk_usage(output).free / 2**20
    return f"{reason}; {free:,.0f} MB are free in {output}"


def _of_torch_file(error: BaseException) -> bool:
    """Whether torch.save or torch.load failed, whose words differ from one point to the next."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, RuntimeError) and frames[-1].filename == serialization.__file__


def first_line(error: BaseException) -> str:
    """An error's message without what follows its first line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
