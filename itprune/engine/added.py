"""What some decoders add to their visual tokens behind the first layers (DeepStack), done on the
tokens alive."""

from __future__ import annotations

from torch import Tensor

from itprune.engine.rows import Rows
from itprune.families.base import Added


def with_added(added: Added | None, level: int, hidden: Tensor, rows: Rows | None) -> Tensor:
    """The output of layer `level` and what the host adds to it.

    Args:
        added: features of all visual tokens; None: this decoder adds nothing.
        level: the layer that is through.
        hidden: (B, L, D) or (1, N, D) in the layout of `rows`.
        rows: what the layer ran on; None: the host's (B, S).
    """
    if added is None or not 0 <= level < len(added.levels):
        return hidden
    features, visual = added.levels[level].to(hidden), added.visual.reshape(-1)
    if rows is None:
        place = visual.nonzero()[:, 0]
    else:
        alive = visual[rows.token]
        order = visual.cumsum(0) - 1
        features = features[order[rows.token[alive]]]
        place = alive.nonzero()[:, 0] if rows.packed else rows.slot[alive]
    return hidden.flatten(0, 1).index_add(0, place, features).view_as(hidden)
