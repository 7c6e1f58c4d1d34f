"""What the methods inside the LLM share: a fraction of the entering tokens to keep after a layer.

Such a method has a plan, layer -> fraction, and a score; the rest is here. Counts refer to the
tokens that entered the LLM: rounding a fraction of what is left, layer after layer, would never
drop the first token of a slowly falling schedule.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from itprune.methods.base import Method
from itprune.options import check_choice
from itprune.ragged import group_sizes, top_per_group
from itprune.tokens import Kept, LayerTokens

QUERIES = ("instruction", "last")
"""Whose attention ranks: all instruction tokens behind the image, or the last of them."""


class Layered(Method):
    """Keeps the best-scored visual tokens after some LLM layers."""

    places: tuple[str, ...] = ("layers",)

    def plan(self) -> Mapping[int, float]:
        """0-based layer -> fraction of the entering visual tokens that goes on after it.

        Raises:
            ValueError: the target in force is out of reach.
        """
        raise NotImplementedError

    def score(self, tokens: LayerTokens) -> Tensor:
        """(N,) float, higher = keep; read at visual tokens."""
        return tokens.attention(tokens.last)

    def count(self, tokens: LayerTokens) -> Tensor:
        """(B,) how many visual tokens of each sample go on: the plan's share, rounded."""
        wanted = tokens.entered * self.plan()[tokens.layer]
        return wanted.round().long()

    def share(self, keep: float | None) -> None:
        before = self.keep
        super().share(keep)
        try:
            self.plan()
        except ValueError:
            super().share(before)
            raise

    def layers(self) -> tuple[int, ...]:
        return tuple(self.plan())

    def shares(self) -> tuple[float, ...] | None:
        return (1.0, *self.plan().values())

    @torch.no_grad()
    def after_layer(self, tokens: LayerTokens) -> Kept:
        return Kept(keep_best(tokens, self.score(tokens), self.count(tokens)))


def alive(tokens: LayerTokens) -> Tensor:
    """(B,) droppable visual tokens of each sample that are left."""
    return group_sizes(tokens.sample[tokens.visual], tokens.samples)


def keep_best(tokens: LayerTokens, score: Tensor, count: Tensor) -> Tensor:
    """(N,) bool: everything but the visual tokens below the `count` best of each sample.

    Args:
        tokens: the tokens alive.
        score: (N,) float.
        count: (B,) visual tokens to keep; more than there are keeps all.
    """
    visual = tokens.visual
    keep = torch.ones_like(visual)
    keep[visual] = top_per_group(score[visual], tokens.sample[visual], count)
    return keep


def check_layers(layers: tuple[int, ...], depth: int, where: str = "prune.layers") -> None:
    """Raises ValueError unless `layers` ascend and leave at least one layer to run faster."""
    if not layers or list(layers) != sorted(set(layers)):
        raise ValueError(f"{where}: must be ascending layer numbers, got {list(layers)}")
    if layers[0] < 0 or layers[-1] > depth - 2:
        raise ValueError(
            f"{where}: {list(layers)} must lie in 0..{depth - 2}, since the model has {depth} LLM "
            "layers and a later one must be left to run faster"
        )


def check_share(where: str, value: float | None) -> None:
    """Raises ValueError unless `value` is None or in [0, 1]; 0 drops every visual token."""
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"{where}: must be a fraction in [0, 1], got {value!r}")


def check_query(value: str) -> None:
    """Raises ValueError for an unknown query set."""
    check_choice("prune.query", value, QUERIES)
