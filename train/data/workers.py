"""What every worker of a DataLoader does before its first sample."""

from __future__ import annotations

import gc
import sys
from types import TracebackType

from torch.utils.data import get_worker_info


def start_worker() -> None:
    """In a worker, leaves out of garbage collection what was there before the fork, and prepares
    for a main process that is interrupted.

    Pages from before the fork are shared with the main process until somebody writes to them, and
    a collection writes to every object it looks at: each worker would end up with its own copy.
    """
    if get_worker_info() is not None:
        gc.freeze()
        sys.excepthook = _tell


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A main process that was interrupted hangs up on a batch half handed over: no news to anyone.
    What fails in a sample comes to the main process another way."""
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, trace)
