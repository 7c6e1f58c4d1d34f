"""The count shared by methods that keep the same fraction of every image."""

from __future__ import annotations

from torch import Tensor


def fixed_count(keep: float | None, lens: Tensor) -> Tensor:
    """(n,) `keep` of each image's `lens` tokens, rounded, at least one.

    Raises:
        ValueError: no target; these methods have no rule of their own.
    """
    if keep is None:
        raise ValueError("prune.keep: this method needs a fraction in (0, 1], it has no own rule")
    return (lens * keep).round().long().clamp(min=1).minimum(lens)
