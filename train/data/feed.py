"""Feed: batches without an end, in an order that a run can go on in.

Trainer's own loader serves a known number of batches an epoch, all of the same size. A feed stands
in its place where that does not hold: batches of so many kept tokens, streams of unknown length.
Every rank draws the same number of batches because none ever runs out; `trainer.max_steps` ends it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

FEED_STATE = "data_state.json"
"""File of a checkpoint with what a feed must remember."""

Counts = Callable[[], tuple[int, int]]
"""Visual tokens of this rank's pruned forwards since the run started, and those kept, both summed
over the LLM's layers. Reading them waits for the device, so a feed asks only where it must."""


class Feed(Protocol):
    """Where the batches of one rank come from."""

    def batches(self, done: int) -> Iterable[dict[str, Any]]:
        """This rank's batches, from number `done` on, exactly as an unbroken run would have them.

        A DataLoader or the like; batches are the collator's, with bad samples and places.
        """
        ...

    def step(self, steps: int, counts: Counts) -> None:
        """A step has ended: every rank calls it, so it may meet the others.

        Args:
            steps: steps done.
            counts: what was kept so far.
        """
        ...

    def epoch(self, steps: int) -> float | None:
        """Passes over the data after `steps` steps; None where there are none to count."""
        ...

    def state_dict(self, counts: Counts) -> dict[str, Any]:
        """What a checkpoint must remember beside the number of steps; plain JSON.

        Every rank calls it, so it may meet the others.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it back, before `batches` is called."""
        ...


class FeedLoader:
    """What Trainer iterates over instead of a DataLoader: it asks where to start only then.

    Args:
        feed: the batches.
        done: how many batches this rank has had, known once a checkpoint has been read.
    """

    def __init__(self, feed: Feed, done: Callable[[], int]) -> None:
        self.feed, self.done = feed, done

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.feed.batches(self.done()))


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes a feed's state into a checkpoint."""
    (folder / FEED_STATE).write_text(json.dumps(state), encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """The feed's state of a checkpoint.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = folder / FEED_STATE
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(
            f"{path}: missing or damaged, so the place in the data is not known; remove {folder} "
            "to go on from an earlier checkpoint"
        ) from None
    return state
