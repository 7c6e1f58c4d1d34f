"""Plan: which samples make the batches of a step, for all ranks at once.

A pure function of the samples' order and their estimated costs, so every rank computes the same
plan and takes its own batches out of it. Samples wait in the order they were drawn; the one that
has waited longest is always in the next step, so none is left behind.

Packed rows cost the sum of their tokens: a step is filled in order, each sample into the emptiest
batch, and then spread anew, the longest first. Padded rows cost the longest one for each sample: a
step takes the sample that has waited longest and those nearest to it in length.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from train.data.lengths import Cost, Lengths, Outline, margin

PATIENCE = 32
"""Samples that may be put off before a step counts as full."""
SPREAD = 8
"""Steps that the samples waiting for padded batches would fill."""


class Drawn(NamedTuple):
    """A sample in the plan."""

    number: int
    """Its place in the data set."""
    outline: Outline


class Priced(NamedTuple):
    """A sample and its cost."""

    cost: Cost
    drawn: Drawn


@dataclass
class Batch:
    """A packed batch in the making."""

    limit: int
    tokens: float = 0.0
    variance: float = 0.0
    samples: list[Drawn] = field(default_factory=list)

    def takes(self, cost: Cost) -> bool:
        """Whether the sample fits; an empty batch takes any."""
        off = margin(self.variance + cost.variance)
        return not self.samples or self.tokens + cost.tokens + off <= self.limit

    def add(self, sample: Priced) -> None:
        self.tokens += sample.cost.tokens
        self.variance += sample.cost.variance
        self.samples.append(sample.drawn)


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
    make = _packed if packed else _padded
    return make(draws, lambda drawn: lengths.cost(drawn.outline, share), limit, batches)


Pricing = Callable[[Drawn], Cost]


def _packed(draws: Draws, price: Pricing, limit: int, batches: int) -> list[list[Drawn]]:
    full = _Emptiest(limit, batches)
    old = iter(draws.waiting)
    aside: list[Drawn] = []
    taken: list[Priced] = []
    while len(aside) < PATIENCE:
        drawn = next(old, None) or draws.draw()
        sample = Priced(price(drawn), drawn)
        if full.put(sample):
            taken.append(sample)
        else:
            aside.append(drawn)
    draws.waiting = [*aside, *old]
    even = _Emptiest(limit, batches)
    taken.sort(key=lambda sample: -sample.cost.tokens)
    fits = all(even.put(sample) for sample in taken)
    return (even if fits else full).contents()


class _Emptiest:
    """Batches of which the emptiest is filled first."""

    def __init__(self, limit: int, batches: int) -> None:
        self.batches = [Batch(limit) for _ in range(batches)]
        self.heap = [(0.0, i) for i in range(batches)]

    def put(self, sample: Priced) -> bool:
        """Whether there was room."""
        batch = self.batches[self.heap[0][1]]
        if not batch.takes(sample.cost):
            return False
        batch.add(sample)
        heapq.heapreplace(self.heap, (batch.tokens, self.heap[0][1]))
        return True

    def contents(self) -> list[list[Drawn]]:
        return [batch.samples for batch in self.batches]


def _padded(draws: Draws, price: Pricing, limit: int, batches: int) -> list[list[Drawn]]:
    waiting = [Priced(price(drawn), drawn) for drawn in draws.waiting]
    total = sum(_widest(sample) for sample in waiting)
    while True:
        while not waiting or total < SPREAD * batches * limit:
            drawn = draws.draw()
            waiting.append(Priced(price(drawn), drawn))
            total += _widest(waiting[-1])
        by_length = sorted(range(len(waiting)), key=lambda i: (_widest(waiting[i]), i))
        widths = [_widest(waiting[i]) for i in by_length]
        oldest = by_length.index(0)
        starts = range(oldest, len(widths))
        first = bisect_left(starts, True, key=lambda s: _cut(widths, s, limit, batches) is not None)
        if first < len(starts):
            break
        total -= batches * limit  # too few for whole batches: a few more
    spans = _cut(widths, starts[first], limit, batches)
    assert spans is not None
    chosen = [by_length[start:end] for start, end in spans]
    gone = {i for places in chosen for i in places}
    draws.waiting = [sample.drawn for i, sample in enumerate(waiting) if i not in gone]
    return [[waiting[i].drawn for i in sorted(places)] for places in chosen]


def _widest(sample: Priced) -> float:
    return sample.cost.tokens + margin(sample.cost.variance)


def _cut(
    widths: Sequence[float], longest: int, limit: int, batches: int
) -> list[tuple[int, int]] | None:
    """Whole batches of neighbours downwards from place `longest`, as spans; None: too few."""
    spans = []
    end = longest + 1
    for _ in range(batches):
        if end <= 0:
            return None
        start = end - max(1, int(limit // widths[end - 1]))
        if start < 0:
            return None
        spans.append((start, end))
        end = start
    return spans
