"""Exact match, and how sure one can be of its mean."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

DRAWS = 2000
LEVEL = 0.95
ENDS = " \t\n.,;:!?\"'`*"


def normalise(text: str) -> str:
    """Lower case, single spaces, no punctuation or quotes at either end."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip(ENDS)


def is_right(answer: str, references: Iterable[str]) -> bool:
    """Whether the answer is one of the references, both normalised."""
    return normalise(answer) in {normalise(text) for text in references}


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap's 95 % interval of the mean.

    Args:
        values: one per sample; samples are what is drawn again.
        seed: of the draws.
    """
    return bounds(drawn_means(values, seed))


def drawn_means(values: Sequence[float], seed: int = 0) -> Tensor:
    """(DRAWS,) means of values drawn again with replacement; one seed draws the same samples of
    any values of the same number."""
    column = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = [
        column[torch.randint(len(column), (len(column),), generator=generator)].mean()
        for _ in range(DRAWS)
    ]
    return torch.stack(means)


def bounds(figures: Tensor) -> tuple[float, float]:
    """The ends between which 95 % of (n,) drawn figures lie."""
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = figures.quantile(tails).tolist()
    return low, high
