"""Costs: tokens and FLOPs of each LLM layer while a prompt is read.

FLOPs are counted by a formula, two for each multiply-add. For n tokens in a layer:

    2 n P + 2 h d n (n + 1)

P are the weights of the layer's matrices, h its attention heads, d a head's width. The first part
is the matrix products; the second is q k^T and the product with v over the pairs a causal mask
lets through. Norms, rotary phases, softmax, the vision encoder, the projector and the output head
are not counted, and of a layer with experts all experts are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from itprune.families.base import Family


@dataclass(frozen=True)
class LayerCost:
    """What decides the FLOPs of one layer."""

    weights: int
    """Of its matrices."""
    attention: int
    """Heads times a head's width."""

    def flops(self, tokens: int) -> int:
        """Of one prompt with so many tokens in this layer."""
        return 2 * tokens * self.weights + 2 * self.attention * tokens * (tokens + 1)


def layer_costs(family: Family) -> list[LayerCost]:
    """One for each LLM layer."""
    config = family.text_model.config.to_dict()
    heads = int(config["num_attention_heads"])
    width = config.get("head_dim") or int(config["hidden_size"]) // heads
    return [LayerCost(_weights(layer), heads * int(width)) for layer in family.layers]


def _weights(layer: nn.Module) -> int:
    """Numbers in a layer's matrices; a quantised one says what it stands for."""
    linear = [m for m in layer.modules() if isinstance(m, nn.Linear)]
    return sum(m.in_features * m.out_features for m in linear)


def mean_flops(costs: Sequence[LayerCost], tokens: Sequence[Sequence[int]]) -> list[float]:
    """(depth,) FLOPs of each layer, averaged over prompts.

    Args:
        costs: one a layer.
        tokens: of each prompt, the tokens in each layer.
    """
    return [
        sum(cost.flops(row[layer]) for row in tokens) / len(tokens)
        for layer, cost in enumerate(costs)
    ]
