"""Qwen3-VL: features of earlier vision blocks are added to visual tokens behind the first decoder
layers (DeepStack).

Changes to the host: none; the engine adds these features instead, to the tokens that stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from itprune.families import register_family
from itprune.families.base import Added
from itprune.families.qwen2_vl import Qwen2Vl


@register_family("qwen3_vl")
class Qwen3Vl(Qwen2Vl):
    """`Qwen3VLForConditionalGeneration`."""

    @property
    def projectors(self) -> tuple[nn.Module, ...]:
        return (*super().projectors, *self.tower.deepstack_merger_list)

    def added_after_layers(self, kwargs: dict[str, Any]) -> Added | None:
        visual = kwargs.get("visual_pos_masks")
        levels = kwargs.get("deepstack_visual_embeds")
        if visual is None or levels is None:
            return None
        kwargs["visual_pos_masks"] = kwargs["deepstack_visual_embeds"] = None
        return Added(visual, list(levels))

    def shrink(self, kind: str, arguments: Mapping[str, Any], grids: list[tuple[int, int]]) -> None:
        """Features of a smaller picture would have no place: those that are added between layers
        are one for each slot of the whole one."""
        return None
