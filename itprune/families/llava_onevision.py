"""LLaVA-OneVision: LLaVA-NeXT's tiles through SigLIP, large mosaics made smaller, and videos.

Changes to the host: none.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration

from itprune.families import register_family
from itprune.families.llava_next import LlavaNext
from itprune.geometry import Geometry


@register_family("llava_onevision")
class LlavaOnevision(LlavaNext):
    """`LlavaOnevisionForConditionalGeneration`."""

    model: LlavaOnevisionForConditionalGeneration

    @property
    def placeholders(self) -> dict[str, int]:
        config = self.model.config
        return {"image": config.image_token_id, "video": config.video_token_id}

    def tile_counts(self, sizes: list[list[int]], arguments: Mapping[str, Any]) -> list[int]:
        """How many tiles the host takes of each image: one, where a sample has several images."""
        counts, together = super().tile_counts(sizes, arguments), arguments.get("batch_num_images")
        if together is None:
            return counts
        images = [int(n) for n in together for _ in range(int(n))]
        if len(images) != len(sizes):
            raise ValueError(
                f"batch_num_images speaks of {len(images)} images and image_sizes of {len(sizes)}; "
                "pass both as one call of the processor returns them"
            )
        return [count if n == 1 else 1 for count, n in zip(counts, images, strict=True)]

    def packing(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        self.strategy(arguments)
        ratio = arguments.get("vision_aspect_ratio")
        return {
            "vision_aspect_ratio": self.model.config.vision_aspect_ratio if ratio is None else ratio
        }

    def geometry(self, kind: str, arguments: Mapping[str, Any]) -> Geometry:
        if kind == "image":
            return super().geometry(kind, arguments)
        self.strategy(arguments)
        # From transformers 5.18 on the argument has this name and the features end in a newline;
        # before, the model puts one behind them, out of reach: it stays.
        ends = "pixel_values_videos" in arguments
        pixels = arguments["pixel_values_videos" if ends else "pixel_values"]
        return self._clips(pixels.shape, ends)

    def _clips(self, shape: torch.Size, ends: bool) -> Geometry:
        """Frames of (clips, frames, C, height, width) pixels, a newline behind each clip."""
        side = self.tower.config.image_size
        if len(shape) != 5 or shape[-2:] != (side, side) or 0 in shape:
            raise ValueError(
                f"pixel_values_videos {tuple(shape)} must be videos of one or more frames of "
                f"{side} x {side} pixels; use the video processor of this model"
            )
        (clips, frames), (rows, columns) = shape[:2], self.usual_grid

        def pool(values: Tensor) -> Tensor:
            maps = values.view(clips * frames, rows * columns, 1)
            return self.model.model.apply_pooling(maps).flatten()

        each = len(pool(torch.zeros(clips * frames * rows * columns))) // (clips * frames)
        clip = torch.arange(clips).repeat_interleave(frames * each)
        return Geometry(
            grid=torch.full((clips * frames, 2), isqrt(each)),
            pool=pool,
            source=torch.arange(clips * frames),
            slot=torch.arange(len(clip)) + clip if ends else None,
            separator=(clip + 1) * (frames * each + 1) - 1 if ends else None,
            clip=torch.arange(clips).repeat_interleave(frames),
            place=None if ends else torch.arange(len(clip)) + clip,
            places=None if ends else len(clip) + clips,
        )
