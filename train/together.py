"""Processes that share a job of inference: they wait for each other, and each has its own GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

LONGEST_WAIT = timedelta(days=30)
"""A process that is done waits for the others, however long they take."""


@contextmanager
def together(processes: int) -> Iterator[None]:
    """A process group for waiting only, hence gloo on any machine."""
    if processes == 1:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def wait(processes: int) -> None:
    """Returns when all processes have called it.

    Raises:
        ValueError: one of them has ended.
    """
    if processes > 1:
        import torch.distributed as dist

        try:
            dist.barrier()
        except RuntimeError:  # of gloo, about sockets
            raise ValueError(
                "another process of this job has ended; its message says why"
            ) from None


def own_device(device: str | None) -> str | None:
    """The device of this process: what the user named, else a GPU of its own; None: any."""
    import torch

    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device is None and torch.cuda.is_available():
        return f"cuda:{local % torch.cuda.device_count()}"
    return device
