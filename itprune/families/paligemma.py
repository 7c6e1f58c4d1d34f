"""PaliGemma and PaliGemma 2: SigLIP tower, one linear layer, Gemma or Gemma 2.

A token is a patch. Image and prompt are one block whose tokens see each other in both directions;
what follows is causal. Positions count from 1.
Changes to the host: none; this file only names its modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PaliGemmaForConditionalGeneration, PreTrainedModel
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from itprune.families import register_family
from itprune.families.siglip import SiglipFamily
from itprune.geometry import Geometry, tiles


@register_family("paligemma")
class PaliGemma(SiglipFamily):
    """`PaliGemmaForConditionalGeneration`."""

    model: PaliGemmaForConditionalGeneration

    @property
    def tower(self) -> PreTrainedModel:
        return self.model.model.vision_tower

    @property
    def projectors(self) -> tuple[nn.Module, ...]:
        return (self.model.model.multi_modal_projector,)

    @property
    def causal(self) -> bool:
        # Without a mask its attention looks in both directions.
        return not self.text_model.config.use_bidirectional_attention

    @property
    def eager(self) -> Callable[..., Any] | None:
        # Gemma 2 caps its attention scores, which sdpa cannot.
        return eager_attention_forward if self.text_model.config.model_type == "gemma2" else None

    def geometry(self, kind: str, arguments: Mapping[str, Any]) -> Geometry:
        pixels, patch = arguments["pixel_values"], self.tower.config.patch_size
        height, width = pixels.shape[-2:]
        rows, columns = height // patch, width // patch
        if not rows or not columns:
            raise ValueError(
                f"pixel_values: images of {height} x {width} pixels hold no patch of {patch} x "
                f"{patch}; let the model's processor resize them"
            )

        def pool(values: Tensor) -> Tensor:
            return values

        return tiles(len(pixels), (rows, columns), pool)
