"""SigLIP: the vision encoder several families share.

It has no CLS, and the features are the output of its last block. Its attention keeps the keywords
it is called with to itself, so that q and k are read where they are projected.
"""

from __future__ import annotations

from typing import cast

from torch import nn

from itprune.families.base import TokenFamily


class SiglipFamily(TokenFamily):
    """A family whose tower is SigLIP, or laid out like it."""

    has_cls = False

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.tower.encoder.layers)

    def block_attention(self, block: nn.Module) -> nn.Module:
        return cast(nn.Module, block.self_attn)

    def query_key(self, block: nn.Module) -> tuple[nn.Module, nn.Module] | None:
        attention = self.block_attention(block)
        return cast(nn.Module, attention.q_proj), cast(nn.Module, attention.k_proj)

    @property
    def feature_block(self) -> int:
        return len(self.blocks) - 1
