"""Qwen2-VL: an encoder for pictures of any size, M x M patches merged into a token, images and
videos, positions of three axes. Its successors share all of it but what their files name.

Changes to the host: none; this file only names its modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from itprune.families import register_family
from itprune.families.base import TokenFamily
from itprune.families.flat_patches import FlatPatches
from itprune.geometry import Geometry, frames

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
USUAL_SIDE = 448
"""Pixels: these encoders have no size of their own."""


@register_family("qwen2_vl")
class Qwen2Vl(TokenFamily):
    """`Qwen2VLForConditionalGeneration`."""

    has_cls = False
    position_axes = 3

    @property
    def placeholders(self) -> dict[str, int]:
        config = self.model.config
        return {"image": config.image_token_id, "video": config.video_token_id}

    def slot_grids(self, count: int) -> tuple[Tensor, Tensor]:
        raise ValueError(
            "pictures of this model differ in size, so the number of visual tokens does not tell "
            "their rows and columns; switch off what looks at a token's neighbours (window: null)"
        )

    # ------------------------------------------------------------------------ vision encoder
    @property
    def tower(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.model.base_model.visual)

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.tower.blocks)

    def block_attention(self, block: nn.Module) -> nn.Module:
        return cast(nn.Module, block.attn)

    @property
    def feature_block(self) -> int:
        return len(self.blocks) - 1

    @property
    def projectors(self) -> tuple[nn.Module, ...]:
        return (cast(nn.Module, self.tower.merger),)

    @property
    def layout(self) -> FlatPatches:
        """How pixels are given."""
        config = self.tower.config
        return FlatPatches(
            channels=config.in_channels,
            frames=config.temporal_patch_size,
            side=config.patch_size,
            merge=config.spatial_merge_size,
        )

    @property
    def usual_grid(self) -> tuple[int, int]:
        side = max(USUAL_SIDE // (self.layout.side * self.layout.merge), 1)
        return side, side

    def blank_image(self) -> dict[str, Tensor]:
        """2 x 2 tokens: the least the processors make of a picture."""
        layout, weight = self.layout, next(self.tower.parameters())
        side = 2 * layout.merge
        return {
            "pixel_values": torch.zeros(side**2, layout.width, device=weight.device),
            "image_grid_thw": torch.tensor([[1, side, side]], device=weight.device),
        }

    # ------------------------------------------------------------------------ tokens
    def geometry(self, kind: str, arguments: Mapping[str, Any]) -> Geometry:
        pixels, thw = self._call(kind, arguments)

        def pool(scores: Tensor) -> Tensor:
            return self.merged(scores, thw)

        geometry = frames(thw, self.layout.merge, pool, video=kind == "video")
        if len(geometry.source) != len(pixels):
            raise ValueError(
                f"{PIXELS[kind]} has {len(pixels)} patches, but {kind}_grid_thw {thw.tolist()} "
                f"has {len(geometry.source)}; pass both as one call of the processor made them"
            )
        return geometry

    def merged(self, scores: Tensor, thw: Tensor) -> Tensor:
        """(P,) scores of patches as the blocks have them -> (V,) means of the tokens."""
        return scores.view(-1, self.layout.merge**2).mean(1)

    def shrink(
        self, kind: str, arguments: Mapping[str, Any], grids: list[tuple[int, int]]
    ) -> dict[str, Any] | None:
        """All frames of a video get the size wanted for its first: the encoder takes one a video.

        Sizes of the old pictures that a caller worked out beforehand (`image_cu_seqlens`, …) are
        left out, so that the host works them out anew.
        """
        pixels, thw = self._call(kind, arguments)
        layout, smaller, sizes, first = self.layout, [], [], 0
        entries = pixels.split(thw.prod(1).tolist())
        for patches, (t, h, w) in zip(entries, thw.tolist(), strict=True):
            rows, columns = (side * layout.merge for side in grids[first])
            if (rows, columns) != (h, w):
                size = (rows * layout.side, columns * layout.side)
                pictures = layout.pictures(patches, (t, h, w)).float()
                pictures = F.interpolate(pictures, size, mode="bicubic", antialias=True)
                patches = layout.patches(pictures).to(pixels.dtype)
            smaller.append(patches)
            sizes.append([t, rows, columns])
            first += t
        kept = {k: v for k, v in arguments.items() if not k.startswith(("image_", "video_"))}
        return {**kept, PIXELS[kind]: torch.cat(smaller), f"{kind}_grid_thw": thw.new_tensor(sizes)}

    def _call(self, kind: str, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """(P, C·T·P·P) patches and (m, 3) int64 frames, rows and columns of patches."""
        thw = arguments.get(f"{kind}_grid_thw")
        if thw is None:
            raise ValueError(
                f"{kind}_grid_thw is missing, so patches cannot be put in their places; pass it "
                f"beside {PIXELS[kind]}, as the processor made it"
            )
        return arguments[PIXELS[kind]], thw.long()
