"""Qwen2.5-VL: most blocks attend inside windows, and all blocks have patches in window order.

Changes to the host: none; this file only names its modules.
"""

from __future__ import annotations

from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from itprune.families import register_family
from itprune.families.qwen2_vl import Qwen2Vl


@register_family("qwen2_5_vl")
class Qwen25Vl(Qwen2Vl):
    """`Qwen2_5_VLForConditionalGeneration`."""

    @property
    def feature_block(self) -> int:
        """The last block that attends to the whole picture: a window's attention compares patches
        with their neighbours only."""
        full = [i for i in self.tower.fullatt_block_indexes if 0 <= i < len(self.blocks)]
        if not full:
            raise ValueError(
                f"vision_config.fullatt_block_indexes {list(self.tower.fullatt_block_indexes)} "
                f"names none of the {len(self.blocks)} vision blocks, so no block compares all "
                "patches of a picture; name one"
            )
        return max(full)

    def merged(self, scores: Tensor, thw: Tensor) -> Tensor:
        tower = self.tower
        order, _ = get_vision_window_index(
            thw,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        windowed = super().merged(scores, thw)
        return windowed[order.argsort().to(windowed.device)]
