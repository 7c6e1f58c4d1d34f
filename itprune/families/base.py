"""What the engine needs to know about a model architecture: where things are, never how to prune.

A family names modules of a stock transformers model. It owns no forward and imports no method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from itprune.geometry import Geometry
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


@dataclass(frozen=True)
class Added:
    """Features a decoder adds to its visual tokens behind the first layers."""

    visual: Tensor
    """(B, S) bool: which positions."""
    levels: list[Tensor]
    """Behind layer i: (V, W), a row for each of these positions in order."""


class Family(ABC):
    """One architecture. Instances are made for one model."""

    has_cls: bool
    """The vision encoder puts a class token first."""
    position_axes: int = 1
    """Position ids of a token: 1, or 3 (time, row, column)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    # ------------------------------------------------------------------------ language model
    @property
    def text_model(self) -> PreTrainedModel:
        """The decoder that owns `layers`."""
        return self.model.get_decoder()

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers."""
        return cast(nn.ModuleList, self.text_model.layers)

    @property
    def placeholders(self) -> dict[str, int]:
        """What fills visual slots of `input_ids`: image, video -> token id."""
        return {"image": self.model.config.image_token_id}

    @property
    def visual_token_ids(self) -> tuple[int, ...]:
        """All placeholder ids."""
        return tuple(self.placeholders.values())

    def rotary(self, hidden: Tensor, position_ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """A decoder layer's rotary tables (B, L, d) for position ids (B, L).

        Not called as a module: DeepSpeed compares which modules ran on each rank, and a batch of
        text needs no tables but the host's own.
        """
        return self.text_model.rotary_emb.forward(hidden, position_ids)

    @property
    def causal(self) -> bool:
        """Whether a layer that gets no mask attends causally; False: to everything."""
        return True

    @property
    def eager(self) -> Callable[..., Any] | None:
        """The decoder's own eager attention, where it has no other kernel to wrap; None: refuse a
        model that runs it."""
        return None

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

    def added_after_layers(self, kwargs: dict[str, Any]) -> Added | None:
        """Takes out of the decoder's arguments what it would add to visual tokens between layers.

        Returns:
            What the engine is to add instead, at the tokens that stay; None: this decoder adds
            nothing, and `kwargs` is untouched.
        """
        return None

    def slot_grids(self, count: int) -> tuple[Tensor, Tensor]:
        """Where visual tokens stand on their images.

        Args:
            count: visual tokens of a batch.

        Returns:
            (n,) how many of them each image has, and (n, 2) rows and columns of its grid; tokens
            beyond the grid stand first. By default all images have the usual size.

        Raises:
            ValueError: images differ in size, so that counts alone do not tell.
        """
        rows, columns = self.host.grid
        images = count // (rows * columns)
        return torch.full((images,), rows * columns), torch.tensor([[rows, columns]] * images)

    # ------------------------------------------------------------------------ vision encoder
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

    def query_key(self, block: nn.Module) -> tuple[nn.Module, nn.Module] | None:
        """The projections to queries and keys, where a block's attention does not hand keywords
        on to its kernel; None: it does."""
        return None

    @property
    @abstractmethod
    def feature_block(self) -> int:
        """0-based index of the block whose attention scores the features."""

    @property
    @abstractmethod
    def projectors(self) -> tuple[nn.Module, ...]:
        """The modules between encoder and language model: what `projector` training trains."""

    @property
    def usual_grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens of an image of the usual size: of its patches, where
        each is one."""
        config = self.tower.config
        side = config.image_size // config.patch_size
        return side, side

    @property
    def vision_shape(self) -> tuple[int, int]:
        """Width and attention heads of the encoder."""
        config = self.tower.config
        return config.hidden_size, config.num_attention_heads

    @property
    def host(self) -> Host:
        """The shape methods are built for."""
        text = self.text_model.config
        width, heads = self.vision_shape
        return Host(
            depth=len(self.layers),
            width=text.hidden_size,
            heads=text.num_attention_heads,
            vision_blocks=len(self.blocks),
            vision_width=width,
            vision_heads=heads,
            feature_block=self.feature_block,
            has_cls=self.has_cls,
            grid=self.usual_grid,
        )

    def blank_image(self) -> dict[str, Tensor]:
        """Keyword arguments of `get_image_features` for one blank image, for batches of text."""
        config, weight = self.tower.config, next(self.tower.parameters())
        shape = (1, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.zeros(shape, device=weight.device)}


class PatchFamily(Family):
    """Visual tokens are the encoder's patches one by one, through a pointwise projector: methods
    act before it, and only what they keep is projected."""

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
    def projectors(self) -> tuple[nn.Module, ...]:
        return (self.projector,)


class TokenFamily(Family):
    """Visual tokens are what `get_image_features` and `get_video_features` return, whatever merging
    or arranging the host does before: methods act on these."""

    @property
    def vision_shape(self) -> tuple[int, int]:
        """The finished tokens are as wide as the language model."""
        return self.text_model.config.hidden_size, super().vision_shape[1]

    @abstractmethod
    def geometry(self, kind: str, arguments: Mapping[str, Any]) -> Geometry:
        """Where the tokens of one call stand. May be asked of a model without weights.

        Args:
            kind: image or video.
            arguments: of `get_image_features` or `get_video_features`, by name.

        Raises:
            ValueError: sizes that make no grid.
        """

    def shrink(
        self, kind: str, arguments: Mapping[str, Any], grids: list[tuple[int, int]]
    ) -> dict[str, Any] | None:
        """Arguments of a call on the same images made smaller.

        Args:
            kind: image or video.
            arguments: as in `geometry`.
            grids: rows and columns of tokens wanted for each grid of `geometry`.

        Returns:
            The arguments; None: the encoder takes one size only.
        """
        return None
