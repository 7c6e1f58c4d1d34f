"""Idefics3 and SmolVLM: SigLIP tower on square tiles, pixel shuffle, one matrix, any causal LM.

An image is several tiles (or one), each between text tokens of its own; a frame of a video is an
image. Tiles that only fill up the batch, all zeros, are left out by the host before its encoder.
Changes to the host: none; this file only names its modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Idefics3ForConditionalGeneration,
    PreTrainedModel,
    SmolVLMForConditionalGeneration,
)

from itprune.families import register_family
from itprune.families.siglip import SiglipFamily
from itprune.families.squares import square_side
from itprune.geometry import Geometry, tiles


@register_family("idefics3")
class Idefics3(SiglipFamily):
    """`Idefics3ForConditionalGeneration`."""

    model: Idefics3ForConditionalGeneration | SmolVLMForConditionalGeneration

    @property
    def tower(self) -> PreTrainedModel:
        return self.model.model.vision_model

    @property
    def projectors(self) -> tuple[nn.Module, ...]:
        return (self.model.model.connector,)

    @property
    def usual_grid(self) -> tuple[int, int]:
        config = self.tower.config
        side = config.image_size // config.patch_size // self.model.config.scale_factor
        return side, side

    def geometry(self, kind: str, arguments: Mapping[str, Any]) -> Geometry:
        pixels, merge = arguments["pixel_values"], self.model.config.scale_factor
        patch = self.tower.config.patch_size
        side, connector = square_side(pixels, (patch, patch), merge), self.model.model.connector
        count = self.real_tiles(pixels)
        if not count:
            raise ValueError(
                "pixel_values: all tiles are zeros, which this model leaves out as padding; leave "
                "pixel_values out of a batch without images"
            )

        def pool(values: Tensor) -> Tensor:
            shuffled = connector.pixel_shuffle(values.view(-1, side * side, 1), merge)
            return shuffled.mean(-1).flatten()

        return tiles(count, (side // merge, side // merge), pool)

    def real_tiles(self, pixels: Tensor) -> int:
        """How many of (B, tiles, C, height, width) tiles the host encodes."""
        # In the host's dtype: what it rounds to zero is padding to it.
        filled = pixels.to(self.model.model.dtype).flatten(0, 1).flatten(1) != 0
        return int(filled.any(1).sum())

    def blank_image(self) -> dict[str, Tensor]:
        # One tile that is not padding: its values do not matter.
        blank = super().blank_image()["pixel_values"]
        return {"pixel_values": torch.ones_like(blank)[None]}


@register_family("smolvlm")
class SmolVLM(Idefics3):
    """`SmolVLMForConditionalGeneration`."""

    def real_tiles(self, pixels: Tensor) -> int:
        """As in Idefics3, but the host encodes one tile where all are padding."""
        return max(super().real_tiles(pixels), 1)
