"""`pyramiddrop`: a constant share of the visual tokens goes after every quarter of the LLM.

After arXiv 2410.17247. After layers L/4, L/2 and 3L/4 the tokens are ranked by the attention the
last instruction token pays them, computed with the q and k projections of the *next* layer on the
hidden states just produced; each stage keeps 1/2 of the stage before. Positions are renumbered
after each drop. As published, counts are rounded down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from itprune.host import Host
from itprune.maths.schedule import bend_stages
from itprune.methods import register_method
from itprune.methods.base import Card
from itprune.methods.layered import Layered, check_layers, check_share
from itprune.tokens import LayerTokens

FRACTION = 0.5
ROUNDING = 1e-3
"""Lifts a product that float32 leaves just below a whole number of tokens."""


@dataclass(frozen=True)
class PyramidDropOptions:
    """Options of `pyramiddrop`."""

    layers: tuple[int, ...] | None = None
    """0-based layers after which a stage ends; null: at a quarter, half and three quarters."""
    fraction: float | None = None
    """What each stage keeps of the one before; null: from prune.keep, and 0.5 without it."""

    def __post_init__(self) -> None:
        check_share("prune.fraction", self.fraction)


@register_method("pyramiddrop")
class PyramidDrop(Layered):
    """Fewer tokens in every stage of the LLM."""

    Options = PyramidDropOptions
    card = Card(
        "stages inside the LLM, each on half of the tokens of the one before",
        paper="2410.17247",
        training="optional",
        notes="In training the released code averages over the tokens before every answer, so a "
        "later turn decides what an earlier one sees; here the query is the last token of the "
        "first user turn, in training and in generation alike.",
    )
    positions = "contiguous"
    look_ahead = True

    def __init__(self, options: PyramidDropOptions, host: Host) -> None:
        super().__init__(options, host)
        quarters = {max(quarter * self.depth // 4 - 1, 0) for quarter in (1, 2, 3)}
        self.stages = tuple(sorted(quarters)) if options.layers is None else options.layers
        check_layers(self.stages, self.depth)

    def plan(self) -> Mapping[int, float]:
        fraction = self.options.fraction
        if fraction is None and self.keep is not None:
            base = self._powers(FRACTION)
            bent = bend_stages(base, self.stages, self.depth, self.keep, "pyramiddrop")
            return dict(zip(self.stages, bent, strict=True))
        powers = self._powers(FRACTION if fraction is None else fraction)
        return dict(zip(self.stages, powers, strict=True))

    def _powers(self, fraction: float) -> tuple[float, ...]:
        return tuple(fraction ** (stage + 1) for stage in range(len(self.stages)))

    def count(self, tokens: LayerTokens) -> Tensor:
        wanted = tokens.entered * self.plan()[tokens.layer]
        return (wanted + ROUNDING).floor().long()
