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
from itprune.families.features import feature_block


@register_family("llava")
class Llava(PatchFamily):
    """`LlavaForConditionalGeneration`."""

    has_cls = True
    model: LlavaForConditionalGeneration

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        if (kind := self.tower.config.model_type) != "clip_vision_model":
            raise ValueError(
                f"the vision encoder {kind!r} of this model is not supported: only CLIP "
                "hands on its attention here and puts a class token first"
            )

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
        return feature_block(self.model.config.vision_feature_layer, len(self.blocks))

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
