"""Qwen2.5-VL shapes: images of any size, a tower of windows, four patches in a token, M-RoPE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, Qwen2_5_VLConfig

from itprune.bench.shape import FIRST_ID, Shape

MERGE = 2
"""Patches along an edge of a token."""
FRAMES = 2
"""Frames in a patch; an image stands in both."""


@dataclass(frozen=True, kw_only=True)
class QwenShape(Shape):
    """Qwen2.5-VL."""

    window: int
    """Pixels along an edge of the window that most blocks look at."""
    full_blocks: tuple[int, ...]
    """0-based blocks that look at the whole image."""
    grids: tuple[tuple[int, int], ...]
    """Rows and columns of visual tokens; the images of a batch take turns."""

    def __post_init__(self) -> None:
        if len({rows * columns for rows, columns in self.grids}) > 1:
            raise ValueError(f"grids {self.grids} have different numbers of tokens")

    @property
    def visual(self) -> int:
        rows, columns = self.grids[0]
        return rows * columns

    def config(self) -> PretrainedConfig:
        vision = {
            "hidden_size": self.vision_width,
            "intermediate_size": self.vision_ffn,
            "depth": self.vision_layers,
            "num_heads": self.vision_heads,
            "patch_size": self.patch,
            "temporal_patch_size": FRAMES,
            "spatial_merge_size": MERGE,
            "window_size": self.window,
            "fullatt_block_indexes": list(self.full_blocks),
            "out_hidden_size": self.width,
        }
        half = self.width // self.heads // 2
        rest = 3 * half // 8
        text = {
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads or self.heads,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [half - 2 * rest, rest, rest],
            },
            "bos_token_id": None,
            "eos_token_id": 2,
        }
        return Qwen2_5_VLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=self.image_id,
            video_token_id=self.vocab - 2,
            vision_start_token_id=FIRST_ID,
        )

    def query_key(self, attention: Any) -> list[Tensor]:
        query, key, _ = attention.qkv.weight.chunk(3)
        return [query, key]

    def images(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        grids = [self.grids[i % len(self.grids)] for i in range(batch)]
        texture = torch.randn(batch, 1, 3, 1, self.patch**2, generator=generator)
        noise = torch.randn(batch, self.visual * MERGE**2, 3, 1, self.patch**2, generator=generator)
        # Attention received depends on how many patches stand out, hardly on how far they do.
        share = self.noise_share(batch)[:, None]
        busy = torch.rand(batch, self.visual, generator=generator) < share
        busy = busy.repeat_interleave(MERGE**2, 1)[:, :, None, None, None]
        patches = torch.where(busy, noise, texture)
        return {
            "pixel_values": patches.expand(-1, -1, -1, FRAMES, -1).flatten(2).flatten(0, 1),
            "image_grid_thw": torch.tensor([[1, MERGE * r, MERGE * c] for r, c in grids]),
        }

    def marks(self, ids: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (ids == self.image_id).int()}
