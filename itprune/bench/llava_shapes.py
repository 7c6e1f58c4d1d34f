"""LLaVA shapes: a CLIP tower on one square view, or on a view and tiles of any resolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    PretrainedConfig,
)

from itprune.bench.shape import Shape


@dataclass(frozen=True, kw_only=True)
class LlavaShape(Shape):
    """LLaVA-1.5: every patch is a visual token."""

    image_size: int

    @property
    def side(self) -> int:
        """Patches along an edge of what the tower sees at once."""
        return self.image_size // self.patch

    @property
    def visual(self) -> int:
        return self.side**2

    def config(self) -> PretrainedConfig:
        return LlavaConfig(**self._parts())

    def _parts(self) -> dict[str, Any]:
        vision = CLIPVisionConfig(
            hidden_size=self.vision_width,
            intermediate_size=self.vision_ffn,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=self.vision_heads,
            image_size=self.image_size,
            patch_size=self.patch,
        )
        text = LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.width,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads or self.heads,
            max_position_embeddings=4096,
        )
        return {"vision_config": vision, "text_config": text, "image_token_id": self.image_id}

    def query_key(self, attention: Any) -> list[Tensor]:
        return [attention.q_proj.weight, attention.k_proj.weight]

    def images(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"pixel_values": self._views(batch, (batch,), generator)}

    def _views(self, batch: int, lead: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """(*lead, 3, height, width); the batch leads."""
        share = self.noise_share(batch).view(batch, *[1] * (len(lead) + 2))
        texture = torch.randn(batch, 3, self.patch, self.patch, generator=generator)
        texture = texture.repeat(1, 1, self.side, self.side)
        texture = texture.view(batch, *[1] * (len(lead) - 1), *texture.shape[1:])
        noise = torch.randn(*lead, 3, self.image_size, self.image_size, generator=generator)
        return (1 - share).sqrt() * texture + share.sqrt() * noise


@dataclass(frozen=True, kw_only=True)
class LlavaNextShape(LlavaShape):
    """LLaVA-NeXT: the whole image small, then its tiles put together, a newline behind each row."""

    tiles: int
    """Tiles along an edge of the square canvas the image is laid on."""
    mosaic: tuple[int, int]
    """Rows and columns of patches that the image fills; one of them fills the canvas."""

    def __post_init__(self) -> None:
        if max(self.mosaic) != self.tiles * self.side:
            raise ValueError(
                f"mosaic {self.mosaic} does not fill {self.tiles} tiles of {self.side} patches "
                "along its longer edge"
            )

    @property
    def visual(self) -> int:
        rows, columns = self.mosaic
        return self.side**2 + rows * (columns + 1)

    def config(self) -> PretrainedConfig:
        edge = self.tiles * self.image_size
        return LlavaNextConfig(**self._parts(), image_grid_pinpoints=[[edge, edge]])

    def images(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        size = torch.tensor(self.mosaic) * self.patch
        return {
            "pixel_values": self._views(batch, (batch, 1 + self.tiles**2), generator),
            "image_sizes": size.repeat(batch, 1),
        }
