"""Feed: batches without an end, in an order that a run can go on in.

Trainer's own loader serves a known number of batches an epoch, all of the same size. A feed stands
in its place where that does not hold: batches of so many kept tokens, streams of unknown length.
Every rank draws the same number of batches because none ever runs out; `trainer.max_steps` ends it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol


class Feed(Protocol):
    """Where the batches of one rank come from."""

    def batches(self, done: int) -> Iterable[dict[str, Any]]:
        """This rank's batches, from number `done` on, exactly as an unbroken run would have them.

        A DataLoader or the like; batches are the collator's, with their bad samples.
        """
        ...

    def step(self, steps: int, kept: float) -> None:
        """A step has ended: every rank calls it, so it may meet the others.

        Args:
            steps: steps done.
            kept: share of the visual tokens that this rank's step ran on, over the LLM's layers.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must remember beside the number of steps; plain JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it back, before `batches` is called."""
        ...
