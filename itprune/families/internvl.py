"""InternVL: InternViT tower with CLS, pixel shuffle, two-layer MLP, any causal LM.

An image is several square tiles and a thumbnail, all of one size; a frame of a video is an image.
Changes to the host: none; this file only names its modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration, PreTrainedModel

from itprune.families import register_family
from itprune.families.base import TokenFamily
from itprune.families.features import check_layer, feature_block
from itprune.families.squares import square_side
from itprune.geometry import Geometry, tiles


@register_family("internvl")
class InternVL(TokenFamily):
    """`InternVLForConditionalGeneration`."""

    has_cls = True
    model: InternVLForConditionalGeneration

    @property
    def tower(self) -> PreTrainedModel:
        return self.model.model.vision_tower

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.tower.encoder.layer)

    def block_attention(self, block: nn.Module) -> nn.Module:
        return cast(nn.Module, block.attention)

    @property
    def feature_block(self) -> int:
        return feature_block(self.model.config.vision_feature_layer, len(self.blocks))

    @property
    def projectors(self) -> tuple[nn.Module, ...]:
        return (self.model.model.multi_modal_projector,)

    @property
    def merge(self) -> int:
        """Patches on a token's side."""
        return round(1 / self.model.config.downsample_ratio)

    @property
    def usual_grid(self) -> tuple[int, int]:
        config = self.tower.config
        rows, columns = config.image_size[0], config.image_size[1]
        return (
            rows // config.patch_size[0] // self.merge,
            columns // config.patch_size[1] // self.merge,
        )

    def geometry(self, kind: str, arguments: Mapping[str, Any]) -> Geometry:
        layer, own = arguments.get("vision_feature_layer"), self.model.config.vision_feature_layer
        check_layer(layer, own, len(self.blocks))
        pixels, model, merge = arguments["pixel_values"], self.model.model, self.merge
        rows, columns = self.tower.config.patch_size
        side = square_side(pixels, (rows, columns), merge)

        def pool(values: Tensor) -> Tensor:
            ratio = self.model.config.downsample_ratio
            shuffled = model.pixel_shuffle(values.view(-1, side, side, 1), scale_factor=ratio)
            return shuffled.mean(-1).flatten()

        return tiles(len(pixels), (side // merge, side // merge), pool)

    def blank_image(self) -> dict[str, Tensor]:
        config, weight = self.tower.config, next(self.tower.parameters())
        shape = (1, config.num_channels, *config.image_size)
        return {"pixel_values": torch.zeros(shape, device=weight.device)}
