"""Plan: which samples make the batches of a step, for all ranks at once.

A pure function of the samples' order and their estimated costs, so every rank computes the same
plan and takes its own batches out of it. Samples wait in the order they were drawn; a step takes
the one that has waited longest and those nearest to it in length, so none is left behind.

A step of like samples is even in all that takes time. Packed rows cost the sum of their kept
tokens, but encoder and projector work on every token, and the host model makes one tensor of all
rows, as long as the longest: many short samples beside one with six images would mostly pay for
padding. Padded rows cost the longest one for each sample.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from train.data.lengths import Cost, Lengths, Outline, margin

PATIENCE = 8
"""Samples that may not fit before a packed step counts as full."""
SPREAD = 8
"""Steps that the waiting samples would fill."""


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
    full: float
    """Its tokens before pruning, by which like samples are found."""


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
        full = lengths.cost(drawn.outline, 1.0).tokens
        return Priced(drawn, lengths.cost(drawn.outline, share), full)

    fill = partial(_fill_packed if packed else _fill_padded, limit=limit, batches=batches)
    return _plan(draws, price, batches * limit, fill)


def _plan(
    draws: Draws,
    price: Callable[[Drawn], Priced],
    budget: float,
    fill: Callable[..., Batches | None],
) -> list[list[Drawn]]:
    """Takes from the samples waiting, the oldest among them, whatever `fill` makes of like ones."""
    waiting = [price(drawn) for drawn in draws.waiting]
    total = sum(_widest(sample) for sample in waiting)
    while True:
        while not waiting or total < SPREAD * budget:
            waiting.append(price(draws.draw()))
            total += _widest(waiting[-1])
        batches = _from_oldest(waiting[0], waiting[1:], fill)
        if batches is not None:
            break
        total -= budget  # too few for whole batches: a few more
    gone = {id(sample) for batch in batches for sample in batch}
    draws.waiting = [sample.drawn for sample in waiting if id(sample) not in gone]
    return [[sample.drawn for sample in batch] for batch in batches]


def _from_oldest(
    oldest: Priced, others: Sequence[Priced], fill: Callable[..., Batches | None]
) -> Batches | None:
    """A step of the oldest sample and those next shorter than it, or as many longer ones as it
    takes where too few are shorter."""
    ranked = sorted(others, key=lambda sample: -sample.full)
    place = bisect_left(ranked, -oldest.full, key=lambda sample: -sample.full)
    more = bisect_left(
        range(place + 1), True, key=lambda n: fill([oldest, *ranked[place - n :]]) is not None
    )
    return None if more > place else fill([oldest, *ranked[place - more :]])


def _fill_packed(ranked: Sequence[Priced], limit: int, batches: int) -> Batches | None:
    """Each sample into the emptiest batch, the longest first; None: too few to fill them."""
    made = [Packed(limit) for _ in range(batches)]
    heap = [(0.0, i) for i in range(batches)]
    misses = 0
    for sample in ranked:
        batch = made[heap[0][1]]
        if batch.takes(sample.cost):
            batch.add(sample)
            heapq.heapreplace(heap, (batch.tokens, heap[0][1]))
            continue
        misses += 1
        if misses > PATIENCE:
            return [batch.samples for batch in made]
    return None


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
