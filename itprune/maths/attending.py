"""Small Transformer parts for methods that are trained, and padding of ragged rows for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pad_rows(rows: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
    """Ragged rows as a table, differentiable.

    Args:
        rows: (V, D), group after group.
        lens: (n,) rows of each group.

    Returns:
        (n, M, D) padded with zeros, and (n, M) bool where a row stands; `table[filled]` gives the
        rows back.
    """
    width = int(lens.max()) if len(lens) else 0
    filled = torch.arange(width, device=lens.device) < lens[:, None]
    table = rows.new_zeros(filled.numel(), rows.shape[1])
    table = table.index_copy(0, filled.flatten().nonzero()[:, 0], rows)
    return table.view(*filled.shape, -1), filled


class SelfAttention(nn.Module):
    """Multi-head self-attention under a mask.

    Args:
        width: D.
        heads: must divide it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, sees: Tensor) -> Tensor:
        """(n, M, D) and (n, M, M) bool, at least one True in each row -> (n, M, D)."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=sees[:, None])
        return self.out(mixed.transpose(1, 2).flatten(2))


class Mixer(nn.Module):
    """Attention layers behind one shared LayerNorm, then one MLP: the encoder of SeTok's code.

    All branches start at zero: a fresh mixer returns its input.
    """

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        attention = [SelfAttention(width, heads) for _ in range(layers)]
        self.layers = nn.ModuleList(attention)
        self.norm_mlp = nn.LayerNorm(width)
        last = nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), last)
        for branch in (*(layer.out for layer in attention), last):
            nn.init.zeros_(branch.weight)
            nn.init.zeros_(branch.bias)

    def forward(self, x: Tensor, sees: Tensor) -> Tensor:
        """(n, M, D) and (n, M, M) bool, at least one True in each row -> (n, M, D)."""
        for layer in self.layers:
            x = x + layer(self.norm(x), sees)
        return x + self.mlp(self.norm_mlp(x))
