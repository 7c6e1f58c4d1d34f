"""Rules: where each inflection rule would have cut one sorted score curve."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from itprune.knee import FLAT, RULES, inflection_count

TOPK = "topk"


@dataclass(frozen=True)
class Cut:
    """What one rule would keep."""

    rule: str
    count: int
    total: int

    @property
    def share(self) -> float:
        return self.count / max(self.total, 1)


@dataclass(frozen=True)
class Curve:
    """The scores of one grid, and what became of them."""

    scores: tuple[float, ...]
    """Best first."""
    kept: int
    cuts: tuple[Cut, ...]
    by_score: bool
    """The kept tokens are the best of this very score."""


def make_curve(score: Tensor, keep: Tensor, share: float | None) -> Curve:
    """One grid's curve.

    Args:
        score: (N,) higher = keep.
        keep: (N,) bool.
        share: fraction of the visual tokens that enters the LLM on average, for `topk`; None: there
            is no target.
    """
    total, kept = len(score), int(keep.sum())
    group = torch.zeros(total, dtype=torch.long, device=score.device)
    # Such a curve has no bend, and all rules keep all of it; the pruner has warned of it already.
    flat = not bool((score.amax() - score.amin() > FLAT * score.abs().amax()).item())
    counts = {
        rule: total if flat else int(inflection_count(score, group, 1, rule)[0]) for rule in RULES
    }
    if share is not None:
        counts[TOPK] = round(total * share)
    worst = score[keep].amin() if kept else torch.inf
    best = score[~keep].amax() if kept < total else -torch.inf
    return Curve(
        scores=tuple(score.float().sort(descending=True).values.tolist()),
        kept=kept,
        cuts=tuple(Cut(rule, count, total) for rule, count in counts.items()),
        by_score=bool(worst >= best),
    )
