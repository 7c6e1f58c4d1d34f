"""Plan: which samples make the batches of a step, for all ranks at once.

A pure function of the samples' order and their estimated costs, so every rank computes the same
plan and takes its own batches out of it. Samples wait in the order they were drawn; the one that
has waited longest is always taken, so none is left behind.

Packed rows cost the sum of their kept tokens, whatever their lengths: a step takes samples as they
were drawn, so it is as mixed as the data is, and shares them out evenly. Padded rows cost the
longest one for each sample, so such a step takes samples of like length.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from train.data.lengths import Cost, Lengths, Outline, margin

PATIENCE = 8
"""Samples that may not fit before a packed step counts as full."""
SPREAD = 8
"""Padded steps that the waiting samples would fill."""


class Drawn(NamedTuple):
    """A sample in the plan."""

    number: int
    """Its place in the data set."""
    outline: Outline


@dataclass(frozen=True)
class Priced:
    """A waiting sample."""

    drawn: Drawn
    cost: Cost


Batches = list[list[Priced]]


@dataclass
class Packed:
    """A packed batch in the making."""

    limit: int
    tokens: float = 0.0
    variance: float = 0.0
    samples: list[Priced] = field(default_factory=list)

    def takes(self, cost: Cost) -> bool:
        """Whether the sample fits; an empty batch takes any."""
        off = margin(self.variance + cost.variance)
        return not self.samples or self.tokens + cost.tokens + off <= self.limit

    def add(self, sample: Priced) -> None:
        self.tokens += sample.cost.tokens
        self.variance += sample.cost.variance
        self.samples.append(sample)


class Draws:
    """The samples in the order they are drawn, epoch after epoch, and those drawn but waiting.

    Args:
        order: the samples' numbers in an epoch; always equally many.
        outline: of a sample, by its number.
    """

    def __init__(
        self, order: Callable[[int], np.ndarray], outline: Callable[[int], Outline]
    ) -> None:
        self.order, self.outline = order, outline
        self.waiting: list[Drawn] = []
        self._epoch, self._numbers = 0, order(0)
        self._count = 0

    @property
    def given(self) -> int:
        """Samples that went into a plan."""
        return self._count - len(self.waiting)

    @property
    def epoch(self) -> float:
        """Passes over the data."""
        return self.given / len(self._numbers)

    def draw(self) -> Drawn:
        """The next sample."""
        epoch, place = divmod(self._count, len(self._numbers))
        if epoch != self._epoch:
            self._epoch, self._numbers = epoch, self.order(epoch)
        self._count += 1
        number = int(self._numbers[place])
        return Drawn(number, self.outline(number))

    def mark(self) -> dict[str, Any]:
        """Where it stands, as plain JSON."""
        return {"drawn": self._count, "waiting": [drawn.number for drawn in self.waiting]}

    def go_to(self, mark: dict[str, Any]) -> None:
        """Goes back to a mark."""
        self._count = mark["drawn"]
        self.waiting = [Drawn(number, self.outline(number)) for number in mark["waiting"]]


def plan_step(
    draws: Draws, lengths: Lengths, share: float, limit: int, batches: int, packed: bool
) -> list[list[Drawn]]:
    """The batches of one step.

    Args:
        draws: where samples come from; what is not used goes on waiting there.
        lengths: estimates their costs.
        share: of the visual tokens that stays.
        limit: tokens of a batch.
        batches: how many to make: ranks times accumulation.
        packed: whether a batch costs the sum of its samples, or else its longest for each.

    Returns:
        As many batches; none is empty, none above the limit but for a single sample.
    """

    def price(drawn: Drawn) -> Priced:
        return Priced(drawn, lengths.cost(drawn.outline, share))

    waiting = [price(drawn) for drawn in draws.waiting]
    plan = _plan_packed if packed else _plan_padded
    made = plan(waiting, lambda: price(draws.draw()), limit, batches)
    gone = {id(sample) for batch in made for sample in batch}
    draws.waiting = [sample.drawn for sample in waiting if id(sample) not in gone]
    return [[sample.drawn for sample in batch] for batch in made]


# ---------------------------------------------------------------------------------------- packed
def _plan_packed(
    waiting: list[Priced], draw: Callable[[], Priced], limit: int, batches: int
) -> Batches:
    """The samples that have waited longest, as many as fill the step, each into the emptiest batch,
    longest first; then those behind them, drawn into `waiting`, wherever one still fits."""
    made = [Packed(limit) for _ in range(batches)]
    heap = [(0.0, i) for i in range(batches)]
    misses = 0
    for sample in _in_turn(waiting, draw, batches * limit):
        _, i = heap[0]
        if made[i].takes(sample.cost):
            made[i].add(sample)
            heapq.heapreplace(heap, (made[i].tokens, i))
            continue
        misses += 1
        if misses == PATIENCE:
            break
    return [batch.samples for batch in made]


def _in_turn(waiting: list[Priced], draw: Callable[[], Priced], room: float) -> Iterator[Priced]:
    """The oldest sample, those that fill the room beside it, longest first, and then, without end,
    all others as they come."""

    def sample(place: int) -> Priced:
        if place == len(waiting):
            waiting.append(draw())
        return waiting[place]

    left, count = room, 0
    while sample(count).cost.tokens <= left:
        left -= sample(count).cost.tokens
        count += 1
    yield sample(0)
    yield from sorted(waiting[1:count], key=lambda one: -one.cost.tokens)
    yield from map(sample, itertools.count(max(count, 1)))


# ---------------------------------------------------------------------------------------- padded
def _plan_padded(
    waiting: list[Priced], draw: Callable[[], Priced], limit: int, batches: int
) -> Batches:
    """The oldest sample and those next shorter than it, or as many longer ones as it takes where
    too few are shorter; more are drawn into `waiting`."""
    total, wanted = sum(_widest(sample) for sample in waiting), SPREAD * batches * limit
    while True:
        while not waiting or total < wanted:
            waiting.append(draw())
            total += _widest(waiting[-1])
        made = _from_oldest(waiting[0], waiting[1:], limit, batches)
        if made is not None:
            return made
        wanted += batches * limit  # too few for whole batches: a few more


def _from_oldest(
    oldest: Priced, others: Sequence[Priced], limit: int, batches: int
) -> Batches | None:
    ranked = sorted(others, key=lambda sample: -_widest(sample))
    place = bisect_left(ranked, -_widest(oldest), key=lambda sample: -_widest(sample))

    def fill(longer: int) -> Batches | None:
        return _fill_padded([oldest, *ranked[place - longer :]], limit, batches)

    more = bisect_left(range(place + 1), True, key=lambda longer: fill(longer) is not None)
    return None if more > place else fill(more)


def _fill_padded(ranked: Sequence[Priced], limit: int, batches: int) -> Batches | None:
    """Neighbours, as many as fit beside the longest of them; None: too few for whole batches."""
    made: Batches = []
    start = 0
    for _ in range(batches):
        end = start
        widest = 0.0
        while end < len(ranked):
            widest = max(widest, _widest(ranked[end]))
            if end > start and (end - start + 1) * widest > limit:
                break
            end += 1
        else:
            return None
        made.append(list(ranked[start:end]))
        start = end
    return made


def _widest(sample: Priced) -> float:
    return sample.cost.tokens + margin(sample.cost.variance)
