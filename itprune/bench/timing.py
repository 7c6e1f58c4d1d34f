"""Timing: interleaved measurements that neighbours on the machine disturb little.

On a CPU one thread works and its CPU seconds count: another process may take the core away, which
stretches the wall clock but not these. On a GPU, or with several threads, the wall clock counts,
after a synchronisation. All variants take turns, every second round backwards, so that a slow drift
of the machine falls on all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


class Clock:
    """Seconds since it was made, in parts.

    Args:
        device: where the work is done.
        threads: CPU threads that do it.
        wall: go by the wall clock in any case.
    """

    def __init__(self, device: torch.device, threads: int, wall: bool = False) -> None:
        self.device, self.threads = device, threads
        self._cuda = device.type == "cuda"
        self._cpu_seconds = not (self._cuda or wall) and threads == 1
        self._read: Callable[[], float] = (
            time.process_time if self._cpu_seconds else time.perf_counter
        )
        self.restart()

    @property
    def unit(self) -> str:
        return "CPU seconds of one thread" if self._cpu_seconds else "wall-clock seconds"

    def restart(self) -> None:
        self._last = self.now()
        self._wall = time.perf_counter()

    def now(self) -> float:
        """The clock's reading, after all work given to a GPU is done."""
        if self._cuda:
            torch.cuda.synchronize()
        return self._read()

    def lap(self) -> float:
        """Seconds since the last lap or restart."""
        before, self._last = self._last, self.now()
        return self._last - before

    def wall(self) -> float:
        """Wall-clock seconds since the restart."""
        return time.perf_counter() - self._wall


def interleave(items: Sequence[T], repeats: int) -> Iterable[T]:
    """Every item once a round; odd rounds go backwards."""
    for turn in range(repeats):
        yield from items if turn % 2 == 0 else items[::-1]


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


@contextmanager
def use_threads(threads: int) -> Iterator[None]:
    """Sets torch's threads for the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
