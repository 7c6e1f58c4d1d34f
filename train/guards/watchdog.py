"""Watchdog: a process that no longer gets on ends with a line that says where, not with silence.

A collective whose partner is gone or stuck waits. A thread in every process sees that nothing has
moved for `trainer.ddp_timeout` seconds, asks what the other processes were last doing, prints one
line and ends its process; the launcher ends the rest. What moves is told by forward pre-hooks on
the tower, the projector and the decoder's layers, which hold a name and nothing else.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from itprune.families import find_family
from train.guards.progress import Progress, shown
from train.guards.stopping import StopRequest

TICK = 0.5
"""Seconds between two looks."""
ANSWER = 6 * TICK
"""Seconds within which a process that runs has said something."""
GRACE = 25.0
"""Seconds without movement that are left to a process asked to stop; launchers kill after 30."""
MENTIONED = 4
STATUS = 1


class Peers:
    """What the other processes were last doing, kept in the store that their group met in."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._beats = 0
        self._store: Any | None = None
        self._world = dist.get_world_size() if dist.is_initialized() else 1
        group: Any = dist.group.WORLD
        if self._world > 1:
            self._store = group.get_group_store().clone()  # a connection that nobody else waits on
            self._store.set_timeout(timedelta(seconds=ANSWER))

    def tell(self) -> None:
        """Says that this process runs, and where it is."""
        if self._store is None:
            return
        self._beats += 1
        try:
            self._store.set(_key(self.progress.rank), f"{self._beats} {self.progress}")
        except RuntimeError:  # the process that keeps the store is gone: the group will notice
            self._store = None

    def missing(self) -> str:
        """Which processes do not answer and where they were; empty for none. Takes seconds."""
        if self._world == 1:
            return ""
        before = self._read()
        time.sleep(ANSWER)
        after = self._read()
        if before is None or after is None:
            return "; rank 0 does not answer"
        others = [rank for rank in range(self._world) if rank != self.progress.rank]
        silent = [rank for rank in others if before[rank] == after[rank]]
        state = "does not answer, last heard of in" if silent else "is in"
        told = [f"rank {rank} {state} {after[rank].partition(' ')[2]}" for rank in silent or others]
        more = len(told) - MENTIONED
        return "; " + "; ".join(told[:MENTIONED]) + (f"; and {more} more" if more > 0 else "")

    def _read(self) -> list[str] | None:
        try:
            if self._store is None:
                return None
            keys = [_key(rank) for rank in range(self._world)]
            return [
                self._store.get(key).decode() if self._store.check([key]) else "0 the start"
                for key in keys
            ]
        except RuntimeError:
            return None


class Watchdog:
    """Watches one process while it trains.

    Args:
        progress: what it says of itself.
        limit: seconds without movement that end it.
        stop: whether it was asked to stop, which shortens them.
        advice: how to go on, the end of the line.
        lost: is told the line, too, before the process ends.
    """

    def __init__(
        self,
        progress: Progress,
        limit: float,
        stop: StopRequest,
        advice: Callable[[], str],
        lost: Callable[[str], None],
    ) -> None:
        self.progress = progress
        self.limit = limit
        self.stop = stop
        self.advice = advice
        self.lost = lost
        self.peers = Peers(progress)
        self._done = threading.Event()
        self._speaks = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.progress.enter(self.progress.doing)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def where(self) -> str:
        """Rank, step, module, samples and what the other processes do; takes seconds.

        Only one thread gets an answer: the process ends with what it says.
        """
        self._speaks.acquire()
        samples = self.progress.samples()
        here = f"rank {self.progress.rank} in {self.progress}"
        return here + (f" (samples: {shown(samples)})" if samples else "") + self.peers.missing()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._done.wait(TICK):
            now = time.monotonic()
            if now - last > ANSWER:  # the process itself was stopped or the machine asleep
                self.progress.moved = now
            last = now
            self.peers.tell()
            still = now - self.progress.moved
            if self.stop.signal is not None and now - self.stop.at > GRACE and still > GRACE:
                self._end(f"asked to stop, but nothing moved for {still:.0f} s")
            if still > self.limit:
                self._end(f"nothing moved for {still:.0f} s (trainer.ddp_timeout)")

    def _end(self, what: str) -> None:
        threading.Thread(target=self._keep_telling, daemon=True).start()
        line = f"{what}: {self.where()}; {self.advice()}"
        print(f"error: {line}", file=sys.stderr, flush=True)
        teller = threading.Thread(target=self.lost, args=(line,), daemon=True)
        teller.start()
        teller.join(ANSWER)  # a file system that hangs must not keep the process
        os._exit(STATUS)

    def _keep_telling(self) -> None:
        """While the line is put together, so that others do not take this process for gone."""
        while True:
            time.sleep(TICK)
            self.peers.tell()


def watch_modules(model: Any, progress: Progress) -> Callable[[], None]:
    """Lets the forward passes of a model say where they are.

    Args:
        model: the transformers model, without a wrapper.
        progress: is told.

    Returns:
        A function that takes the hooks off.
    """
    family = find_family(model)
    count = len(family.layers)
    names = [("the vision tower", family.tower)]
    names += [("the projector", module) for module in family.projectors]
    names += [(f"decoder layer {i + 1} of {count}", m) for i, m in enumerate(family.layers)]

    def says(name: str) -> Callable[..., None]:
        return lambda *call: progress.enter(name)

    hooks = [module.register_forward_pre_hook(says(name)) for name, module in names]
    hooks.append(model.register_forward_hook(says("the backward pass")))

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return remove


def _key(rank: int) -> str:
    return f"itprune/rank/{rank}"
