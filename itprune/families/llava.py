"""LLaVA-1.5: CLIP tower with CLS, two-layer MLP projector, any causal LM.

Changes to the host: none; this file only names its modules.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from itprune.families import register_family
from itprune.families.base import Family


@register_family("llava")
class Llava(Family):
    """`LlavaForConditionalGeneration`."""

    has_cls = True
    model: LlavaForConditionalGeneration

    @property
    def tower(self) -> PreTrainedModel:
        return self.model.model.vision_tower

    @property
    def feature_block(self) -> nn.Module:
        layer = self.model.config.vision_feature_layer
        layer = layer if isinstance(layer, int) else layer[-1]
        blocks = self.tower.encoder.layers
        # hidden_states has one entry more than there are blocks: entry f is block f - 1's output.
        index = layer - 1 if layer > 0 else len(blocks) + layer
        if layer == 0 or not 0 <= index < len(blocks):
            raise ValueError(
                f"vision_feature_layer {layer} of this model is not the output of one of its "
                f"{len(blocks)} vision blocks, so there is no attention to score with"
            )
        return cast(nn.Module, blocks[index])

    @property
    def feature_attention(self) -> nn.Module:
        return cast(nn.Module, self.feature_block.self_attn)

    @property
    def projector(self) -> nn.Module:
        return self.model.model.multi_modal_projector

    def blank_image(self) -> dict[str, Tensor]:
        config, weight = self.model.config.vision_config, next(self.tower.parameters())
        shape = (1, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.zeros(shape, device=weight.device)}
