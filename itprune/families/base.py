"""What the engine needs to know about a model architecture: where things are, never how to prune.

An adapter names modules of a stock transformers model. It owns no forward and imports no method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from itprune.host import Host

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class FeedForward:
    """A decoder layer's feed-forward block, whose hidden channels are computed one by one."""

    module: nn.Module
    first: tuple[str, ...]
    """Submodules that make the channels, one output each; none where they do otherwise."""
    last: str
    """The submodule that takes them in."""


class Family(ABC):
    """One architecture. Instances are made for one model."""

    has_cls: bool
    """The vision encoder puts a class token first."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    def text_model(self) -> PreTrainedModel:
        """The decoder that owns `layers`."""
        return self.model.get_decoder()

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers."""
        return cast(nn.ModuleList, self.text_model.layers)

    @property
    def visual_token_ids(self) -> tuple[int, ...]:
        """Placeholder ids in `input_ids`, one per visual token."""
        return (self.model.config.image_token_id,)

    def rotary(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's rotary tables (B, L, d) for position ids (B, L)."""
        return self.text_model.rotary_emb(hidden, position_ids)

    def input_norm(self, layer: nn.Module) -> nn.Module:
        """What a decoder layer applies before its attention."""
        return cast(nn.Module, layer.input_layernorm)

    def attention(self, layer: nn.Module) -> nn.Module:
        """A decoder layer's attention module."""
        return cast(nn.Module, layer.self_attn)

    def feed_forward(self, layer: nn.Module) -> FeedForward | None:
        """A decoder layer's feed-forward block; None: one without a last projection."""
        block = cast(nn.Module, layer.mlp)
        names = {name for name, _ in block.named_children()}
        first = ("gate_proj", "up_proj")
        if "down_proj" not in names:
            return None
        return FeedForward(block, first if names.issuperset(first) else (), "down_proj")

    def slot_grids(self, count: int) -> tuple[Tensor, Tensor]:
        """Where visual tokens stand on their images.

        Args:
            count: visual tokens of a batch.

        Returns:
            (n,) how many of them each image has, and (n, 2) rows and columns of its grid; tokens
            beyond the grid stand first. By default all images have the usual size.
        """
        rows, columns = self.host.grid
        images = count // (rows * columns)
        return torch.full((images,), rows * columns), torch.tensor([[rows, columns]] * images)

    @property
    @abstractmethod
    def tower(self) -> PreTrainedModel:
        """The vision encoder; called with the pixels of all images."""

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The encoder's blocks."""

    @abstractmethod
    def block_attention(self, block: nn.Module) -> nn.Module:
        """An encoder block's attention module."""

    @property
    @abstractmethod
    def feature_block(self) -> int:
        """0-based index of the block whose output becomes the features."""

    @property
    @abstractmethod
    def embeddings(self) -> nn.Module:
        """The encoder's embeddings: pixels in, (n, T, D) tokens out."""

    @abstractmethod
    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """Rows and columns of patches the encoder makes of (n, C, height, width) pixels."""

    @abstractmethod
    def resize(self, pixels: Tensor, grid: tuple[int, int]) -> dict[str, Any]:
        """Arguments of a tower call on the same pixels shrunk to a grid of patches."""

    @property
    @abstractmethod
    def projector(self) -> nn.Module:
        """A pointwise module from vision features (n, P, D) to LLM width: it may be handed any
        subset of the tokens."""

    @property
    def host(self) -> Host:
        """The shape methods are built for."""
        text, vision = self.text_model.config, self.tower.config
        side = vision.image_size // vision.patch_size
        return Host(
            depth=len(self.layers),
            width=text.hidden_size,
            heads=text.num_attention_heads,
            vision_blocks=len(self.blocks),
            vision_width=vision.hidden_size,
            vision_heads=vision.num_attention_heads,
            feature_block=self.feature_block,
            has_cls=self.has_cls,
            grid=(side, side),
        )

    @abstractmethod
    def blank_image(self) -> dict[str, Tensor]:
        """Keyword arguments of `get_image_features` for one blank image, for batches of text."""
