"""Sharing one `keep` out over the stages.

`keep` is the fraction of visual tokens averaged over the LLM's layers. With stages acting before
the LLM and after layers k1 < k2 < …, segment j of the layers runs on fraction f_j, and
sum_j length_j * f_j / depth = keep. Where the user leaves the split open, each stage keeps two
thirds of what the one before it kept: 26 % into the LLM and 18 % after half of the layers average
22 %. What one layer's attention takes for idle may be needed by the next, so the sharper cut is
left to the stage that sees the whole image; docs/method.md has the figures.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

LATER_SHARE = 2 / 3


@lru_cache(maxsize=256)
def split_keep(
    keep: float, depth: int, layers: tuple[int, ...], fixed: tuple[float | None, ...]
) -> tuple[float, ...]:
    """Fractions of the visual tokens alive in each segment of the LLM.

    Args:
        keep: layer-average target in (0, 1].
        depth: number of LLM layers.
        layers: ascending 0-based layers after which a later stage acts.
        fixed: fractions the user named, None where open; one more than `layers`.

    Returns:
        One fraction per segment, non-increasing, in (0, 1].

    Raises:
        ValueError: the named fractions leave nothing for the open ones.
    """
    edges = (0, *(k + 1 for k in layers), depth)
    lengths = [b - a for a, b in pairwise(edges)]
    if all(f is not None for f in fixed):
        return tuple(float(f) for f in fixed if f is not None)
    low, high = 0.0, 3.0 ** len(lengths)
    if _spend(_fractions(high, fixed), lengths) < keep * depth - 1e-9:
        raise ValueError(
            f"prune: the stages' own keep values {fixed} cannot average keep={keep} over "
            f"{depth} layers; leave one of them out"
        )
    for _ in range(60):
        middle = (low + high) / 2
        enough = _spend(_fractions(middle, fixed), lengths) >= keep * depth
        low, high = (low, middle) if enough else (middle, high)
    fractions = _fractions(high, fixed)
    if min(fractions) <= 1e-6:
        raise ValueError(
            f"prune: the stages' own keep values {fixed} already spend more than keep={keep} "
            f"over {depth} layers; raise keep or lower them"
        )
    return fractions


def _fractions(first: float, fixed: tuple[float | None, ...]) -> tuple[float, ...]:
    """All fractions when the first open stage aims at `first`; none exceeds the one before."""
    out: list[float] = []
    aim = first
    for share in fixed:
        out.append(min(aim if share is None else share, out[-1] if out else 1.0))
        if share is None:
            aim *= LATER_SHARE
    return tuple(out)


def _spend(fractions: tuple[float, ...], lengths: list[int]) -> float:
    return sum(f * n for f, n in zip(fractions, lengths, strict=True))
