"""`fastv`: half of the visual tokens go after the second LLM layer (arXiv 2403.06764).

Visual tokens are ranked by the attention the last instruction token pays them in that layer, mean
over heads, rotary phase included. The publication drops R = 50 % at K = 2, which is after layer 1
counted from 0; whatever is kept keeps its position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from itprune.host import Host
from itprune.maths.schedule import bend_stages
from itprune.methods import register_method
from itprune.methods.base import Card
from itprune.methods.layered import Layered, check_layers, check_share

LAYER, FRACTION = 1, 0.5
"""Published K = 2 (0-based: after layer 1) and the share that stays."""
PUBLISHED_DEPTH = 32


@dataclass(frozen=True)
class FastVOptions:
    """Options of `fastv`."""

    layer: int | None = None
    """0-based layer after which tokens are dropped; null: 1, less in models below 16 layers."""
    fraction: float | None = None
    """Share of the visual tokens kept after it; null: from prune.keep, and 0.5 without it."""

    def __post_init__(self) -> None:
        check_share("prune.fraction", self.fraction)


@register_method("fastv")
class FastV(Layered):
    """One drop, early in the LLM."""

    Options = FastVOptions
    card = Card(
        "half of the tokens after LLM layer 2, by the last token's attention",
        paper="2403.06764",
        notes="Tokens are removed, where the released code masks them or removes them without a "
        "KV cache; in multi-turn training the query is the last token of the first user turn, so "
        "no later turn decides what an earlier one sees.",
    )

    def __init__(self, options: FastVOptions, host: Host) -> None:
        super().__init__(options, host)
        default = LAYER if self.depth >= 16 else round(2 * self.depth / PUBLISHED_DEPTH) - 1
        self.layer = max(default, 0) if options.layer is None else options.layer
        check_layers((self.layer,), self.depth, "prune.layer")

    def plan(self) -> Mapping[int, float]:
        if self.options.fraction is not None:
            return {self.layer: self.options.fraction}
        if self.keep is None:
            return {self.layer: FRACTION}
        (fraction,) = bend_stages((FRACTION,), (self.layer,), self.depth, self.keep, "fastv")
        return {self.layer: fraction}
