"""Mixture: several data entries drawn in given proportions.

An epoch has as many samples as the entries together. Each entry is walked along one shuffle after
the other, across epochs: whatever its weight, none of its samples comes again before all others
have come. The order depends on nothing but seed and epoch, so every rank has the same one, and so
has a run that goes on; it is made of places in the data set, which hands out its samples as ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class Mixture:
    """The order of samples that lie one entry behind the other.

    Args:
        sizes: samples of each entry.
        weights: one number an entry; only their proportion counts.
        names: of the entries, for the message.

    Raises:
        ValueError: an entry without samples, or one whose weight gives it none of an epoch's.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], names: Sequence[str]
    ) -> None:
        self.sizes = list(sizes)
        self.total = sum(sizes)
        for name, size in zip(names, sizes, strict=True):
            if not size:
                raise ValueError(f"data.weights: {name} holds no sample to draw")
        self.counts = shares(self.total, weights)
        for name, count, weight in zip(names, self.counts, weights, strict=True):
            if not count:
                raise ValueError(
                    f"data.weights: {weight:g} gives {name} not one of an epoch's {self.total} "
                    "samples; raise it or leave the entry out"
                )

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """(N,) places of the epoch's samples."""
        first = np.cumsum([0, *self.sizes[:-1]])
        drawn = [
            first[i] + walk(self.sizes[i], epoch * count, count, (seed, i))
            for i, count in enumerate(self.counts)
        ]
        order = np.concatenate(drawn)
        # Shuffled is which entry comes next; within an entry the walk's order stays.
        entry = np.repeat(np.arange(len(self.counts)), self.counts)
        np.random.default_rng((seed, len(self.counts), epoch)).shuffle(entry)
        mixed = np.empty_like(order)
        mixed[np.argsort(entry, kind="stable")] = order
        return mixed


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` divided in proportion to the weights, by largest remainders."""
    exact = np.array(weights, dtype=float) / sum(weights) * total
    counts = np.floor(exact).astype(int)
    rest = np.argsort(counts - exact, kind="stable")[: total - counts.sum()]
    counts[rest] += 1
    return [int(count) for count in counts]


def walk(size: int, start: int, count: int, seed: tuple[int, int]) -> np.ndarray:
    """(count,) numbers below `size` from place `start` on of an endless row of shuffles."""
    parts = [
        np.random.default_rng((*seed, shuffle)).permutation(size)
        for shuffle in range(start // size, (start + count - 1) // size + 1)
    ]
    skip = start % size
    return np.concatenate(parts)[skip : skip + count]


class EpochSampler(Sampler[int]):
    """The order of each epoch of a data set, for a DataLoader.

    Args:
        mixture: makes the orders.
        seed: of all of them.
    """

    def __init__(self, mixture: Mixture, seed: int) -> None:
        self.mixture, self.seed, self.epoch = mixture, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.mixture.total

    def __iter__(self) -> Iterator[int]:
        return iter(self.mixture.order(self.seed, self.epoch).tolist())
