"""Where a process is: its rank, step, what it is doing and on which samples.

The trainer and hooks on a few modules say it as they go along; whatever has to tell a user what
happened, a thread or an exception, reads it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

SHOWN = 8


def shown(places: Sequence[str]) -> str:
    """A few sample places, and how many more there are."""
    text = "; ".join(places[:SHOWN])
    return text + (f"; and {len(places) - SHOWN} more" if len(places) > SHOWN else "")


@dataclass
class Progress:
    """What one process was last seen doing."""

    rank: int
    samples: Callable[[], Sequence[str]]
    """The places of the samples at work."""
    step: int = 0
    """The optimizer step at work, from 1 on; 0: none has begun."""
    doing: str = "the start"
    moved: float = field(default_factory=time.monotonic)
    """When that was last said, in seconds of `time.monotonic`."""

    def enter(self, doing: str) -> None:
        """Says what begins now."""
        self.doing = doing
        self.moved = time.monotonic()

    def __str__(self) -> str:
        return f"step {self.step}, {self.doing}" if self.step else self.doing
