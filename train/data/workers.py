"""What every worker of a DataLoader does before its first sample."""

from __future__ import annotations

import gc

from torch.utils.data import get_worker_info


def keep_shared() -> None:
    """In a worker, leaves out of garbage collection what was there before the fork.

    Its pages are shared with the main process until somebody writes to them, and a collection
    writes to every object it looks at: each worker would end up with a copy of its own.
    """
    if get_worker_info() is not None:
        gc.freeze()
