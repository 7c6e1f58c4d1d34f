"""Gemma 3: SigLIP tower, average pooling, one matrix, a decoder with two kinds of layers.

Its layers alternate between a sliding window and full attention, each kind with a mask and rotary
tables of its own, and the tokens of an image see each other in both directions.
Changes to the host: none; this file only names its modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import Gemma3ForConditionalGeneration, PreTrainedModel

from itprune.families import register_family
from itprune.families.siglip import SiglipFamily
from itprune.geometry import Geometry, tiles


@register_family("gemma3")
class Gemma3(SiglipFamily):
    """`Gemma3ForConditionalGeneration`."""

    model: Gemma3ForConditionalGeneration

    @property
    def tower(self) -> PreTrainedModel:
        return self.model.model.vision_tower

    @property
    def projectors(self) -> tuple[nn.Module, ...]:
        return (self.model.model.multi_modal_projector,)

    @property
    def usual_grid(self) -> tuple[int, int]:
        # The host's pooling cuts off what does not fill a whole kernel.
        projector = self.model.model.multi_modal_projector
        side = projector.patches_per_image // projector.kernel_size
        return side, side

    def rotary(self, hidden: Tensor, position_ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        kind = self.text_model.config.layer_types[layer]
        return self.text_model.rotary_emb.forward(hidden, position_ids, kind)

    def geometry(self, kind: str, arguments: Mapping[str, Any]) -> Geometry:
        projector, config = self.model.model.multi_modal_projector, self.tower.config
        pixels, side = arguments["pixel_values"], projector.patches_per_image
        height, width = pixels.shape[-2:]
        if (height // config.patch_size, width // config.patch_size) != (side, side):
            size = config.image_size
            raise ValueError(
                f"pixel_values: this model pools images of {size} x {size} pixels only, not of "
                f"{height} x {width}; let the model's processor resize or crop them"
            )

        def pool(values: Tensor) -> Tensor:
            return projector.avg_pool(values.view(-1, 1, side, side)).flatten()

        return tiles(len(pixels), self.usual_grid, pool)
