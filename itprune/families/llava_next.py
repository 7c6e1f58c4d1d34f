"""LLaVA-NeXT: one image is several tiles, packed into an overview and a mosaic with line ends.

Changes to the host: none; this file names its modules and hands out its packing.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration, PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from itprune.families import register_family
from itprune.families.base import TokenFamily
from itprune.families.features import check_layer, feature_block
from itprune.families.mosaic import mosaic
from itprune.geometry import Geometry

CLASS_TOKEN = {"clip_vision_model": True, "siglip_vision_model": False}
"""The encoders we know, and whether they put a class token first."""


@register_family("llava_next")
class LlavaNext(TokenFamily):
    """`LlavaNextForConditionalGeneration`."""

    model: LlavaNextForConditionalGeneration

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        kind = self.tower.config.model_type
        if kind not in CLASS_TOKEN:
            raise ValueError(
                f"the vision encoder {kind!r} of this model is not supported; supported: "
                f"{', '.join(CLASS_TOKEN)}"
            )
        self.has_cls = CLASS_TOKEN[kind]

    @property
    def tower(self) -> PreTrainedModel:
        return self.model.model.vision_tower

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.tower.encoder.layers)

    def block_attention(self, block: nn.Module) -> nn.Module:
        return cast(nn.Module, block.self_attn)

    def query_key(self, block: nn.Module) -> tuple[nn.Module, nn.Module] | None:
        if self.has_cls:  # CLIP's attention hands keywords on, SigLIP's does not
            return None
        attention = self.block_attention(block)
        return cast(nn.Module, attention.q_proj), cast(nn.Module, attention.k_proj)

    @property
    def feature_block(self) -> int:
        return feature_block(self.model.config.vision_feature_layer, len(self.blocks))

    @property
    def projectors(self) -> tuple[nn.Module, ...]:
        return (self.model.model.multi_modal_projector,)

    def slot_grids(self, count: int) -> tuple[Tensor, Tensor]:
        raise ValueError("images of this model differ in rows and columns; set window to null")

    def blank_image(self) -> dict[str, Tensor]:
        config, weight = self.tower.config, next(self.tower.parameters())
        size = list(min(self.model.config.image_grid_pinpoints, key=prod))
        tiles = self.tile_counts([size], {})[0]
        shape = (1, tiles, config.num_channels, config.image_size, config.image_size)
        return {
            "pixel_values": torch.zeros(shape, device=weight.device),
            "image_sizes": torch.tensor([size], device=weight.device),
        }

    # ------------------------------------------------------------------------ geometry
    def tile_counts(self, sizes: list[list[int]], arguments: Mapping[str, Any]) -> list[int]:
        """How many tiles the host takes of each image, given its height and width."""
        pinpoints, side = self.model.config.image_grid_pinpoints, self.tower.config.image_size
        return [image_size_to_num_patches(size, pinpoints, side) for size in sizes]

    def packing(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The keywords the host packs with, beside features, sizes and line end."""
        return {"vision_feature_select_strategy": self.strategy(arguments)}

    def strategy(self, arguments: Mapping[str, Any]) -> str:
        """Which of a tile's tokens become features: such that a rectangle is left."""
        layer, own = arguments.get("vision_feature_layer"), self.model.config.vision_feature_layer
        check_layer(layer, own, len(self.blocks))
        name = "vision_feature_select_strategy"
        chosen, fits = arguments.get(name), "default" if self.has_cls else "full"
        chosen = self.model.config.vision_feature_select_strategy if chosen is None else chosen
        if chosen != fits:
            raise ValueError(
                f"{name} {chosen!r} leaves no grid of a tile's patches with the vision encoder of "
                f"this model; set it to {fits!r}"
            )
        return fits

    def geometry(self, kind: str, arguments: Mapping[str, Any]) -> Geometry:
        sizes = self._sizes(arguments)
        counts, options = self.tile_counts(sizes, arguments), self.packing(arguments)
        self._check_tiles(arguments["pixel_values"].shape, sizes, counts)

        def pack(maps: list[Tensor], line_end: Tensor) -> list[Tensor]:
            packed, _ = self.model.model.pack_image_features(
                maps, sizes, image_newline=line_end, **options
            )
            return packed

        return mosaic(pack, counts, self.usual_grid)

    def _sizes(self, arguments: Mapping[str, Any]) -> list[list[int]]:
        given = arguments.get("image_sizes")
        given = given.tolist() if isinstance(given, Tensor) else given or ()
        sizes = [list(size) for size in given]
        if not sizes or min(map(min, sizes)) < 1:
            raise ValueError(
                f"image_sizes {sizes} must name height and width of each image; pass those that "
                "the processor returns beside pixel_values"
            )
        return sizes

    def _check_tiles(self, shape: torch.Size, sizes: list[list[int]], counts: list[int]) -> None:
        side = self.tower.config.image_size
        if len(shape) not in (4, 5) or shape[-2:] != (side, side):
            raise ValueError(
                f"pixel_values {tuple(shape)} must be tiles of {side} x {side} pixels; use the "
                "processor of this model"
            )
        fits = shape[0] == sum(counts)
        if len(shape) == 5:  # each image padded to the most tiles of any
            fits = shape[0] == len(sizes) and shape[1] >= max(counts)
        if not fits:
            raise ValueError(
                f"pixel_values {tuple(shape)} do not hold {counts} tiles, which image_sizes "
                f"{sizes} stand for; pass both as one call of the processor returns them"
            )
