"""LLaVA-1.5: CLIP tower with CLS, two-layer MLP projector, any causal LM.

Changes to the host: none; this file only names its modules.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from itprune.families import register_family
from itprune.families.base import PatchFamily


@register_family("llava")
class Llava(PatchFamily):
    """`LlavaForConditionalGeneration`."""

    has_cls = True
    model: LlavaForConditionalGeneration

    @property
    def tower(self) -> PreTrainedModel:
        return self.model.model.vision_tower

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.tower.encoder.layers)

    def block_attention(self, block: nn.Module) -> nn.Module:
        return cast(nn.Module, block.self_attn)

    @property
    def embeddings(self) -> nn.Module:
        return cast(nn.Module, self.tower.embeddings)

    @property
    def feature_block(self) -> int:
        layer = self.model.config.vision_feature_layer
        layer = layer if isinstance(layer, int) else layer[-1]
        # hidden_states has one entry more than there are blocks: entry f is block f - 1's output.
        index = layer - 1 if layer > 0 else len(self.blocks) + layer
        if layer == 0 or not 0 <= index < len(self.blocks):
            raise ValueError(
                f"vision_feature_layer {layer} of this model is not the output of one of its "
                f"{len(self.blocks)} vision blocks, so there is no attention to score with"
            )
        return index

    def slot_grids(self, count: int) -> tuple[Tensor, Tensor]:
        rows, columns = self.host.grid
        cls = self.model.config.vision_feature_select_strategy == "full"
        slots = rows * columns + int(cls)
        images = count // slots
        return torch.full((images,), slots), torch.tensor([[rows, columns]] * images)

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        patch = self.tower.config.patch_size
        return pixels.shape[-2] // patch, pixels.shape[-1] // patch

    def resize(self, pixels: Tensor, grid: tuple[int, int]) -> dict[str, Any]:
        patch = self.tower.config.patch_size
        size = (grid[0] * patch, grid[1] * patch)
        small = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True)
        return {"pixel_values": small.to(pixels.dtype), "interpolate_pos_encoding": True}

    @property
    def projector(self) -> nn.Module:
        return self.model.model.multi_modal_projector

    def blank_image(self) -> dict[str, Tensor]:
        config, weight = self.model.config.vision_config, next(self.tower.parameters())
        shape = (1, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.zeros(shape, device=weight.device)}
