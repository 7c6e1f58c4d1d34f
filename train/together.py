"""Processes that share a job of inference: they wait for each other, and each has its own GPU."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

LONGEST_WAIT = timedelta(days=30)
"""A process that is done waits for the others, however long they take."""


def start(args: argparse.Namespace, run: Callable[[argparse.Namespace, int, int], int]) -> int:
    """One process of the job, as a launcher started it.

    Args:
        args: from the command line, with `local_rank` and `traceback`.
        run: args, rank, processes -> exit status.

    Returns:
        The exit status; what the user can put right is one sentence on stderr.
    """
    from train.launcher import read_launch

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # PEFT imports bitsandbytes, which tells every CPU user of an optional kernel it lacks.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        launch = read_launch(args.local_rank)
        with together(launch.processes):
            return run(args, launch.rank, launch.processes)
    except (ValueError, OSError) as error:
        if args.traceback:
            raise
        rank = int(os.environ.get("RANK", "0"))
        where = f" (rank {rank})" if rank else ""
        print(f"error{where}: {error}", file=sys.stderr)
        return 1


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
