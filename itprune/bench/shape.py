"""Shape: what a bench needs to know of a model and its input, whatever the architecture.

Random weights are enough to measure time, but a random tower looks at all patches alike, so every
image would keep the same number of tokens. Two things give the counts of real pictures, which
differ by a factor of three or so: the projections of q and k in the block that scores are scaled
up, and image i is one texture plus a share of noise, of every patch or of the patches. The share
grows from image to image and with it, or against it, the number of tokens that stand out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

FIRST_ID = 1
"""Opens every row, right before the image."""


@dataclass(frozen=True, kw_only=True)
class Shape(ABC):
    """Sizes of a model and of one row of its input: an image, then text."""

    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_ffn: int
    patch: int
    width: int
    layers: int
    heads: int
    kv_heads: int = 0
    """Heads of keys and values; 0: as many as of queries."""
    ffn: int
    vocab: int
    text: int = 64
    """Text tokens of a row, the first one included."""
    supervised: int = 32
    """Text tokens at the end of a row that carry labels."""
    batch: int = 8
    """Rows of a batch where the caller names no number."""
    curve_gain: float = 40.0
    """Factor on the attention logits of the block that scores."""
    noise_shares: tuple[float, float] = (0.02, 0.8)
    """Bounds of the share of noise, from the first to the last image of a batch."""
    lora: bool = False
    """Train LoRA in bf16 with gradient checkpointing; else all but the tower in fp32."""
    gpu_gib: int = 0
    """Memory of a CUDA GPU this needs; 0: runs anywhere."""

    @property
    @abstractmethod
    def visual(self) -> int:
        """Visual tokens of every image."""

    @abstractmethod
    def config(self) -> PretrainedConfig:
        """The model."""

    @abstractmethod
    def query_key(self, attention: nn.Module) -> list[Tensor]:
        """Weights (rows, D) that make q and k in an attention module of the tower; the factor on
        the logits is the product of the factors on both."""

    @abstractmethod
    def images(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What the model is given of `batch` images, in fp32."""

    def marks(self, ids: Tensor) -> dict[str, Tensor]:
        """What else the model has to be told about (B, S) tokens."""
        return {}

    @property
    def image_id(self) -> int:
        return self.vocab - 1

    @property
    def words(self) -> tuple[int, int]:
        """First id of text and the id behind the last; the ids above hold a place for pictures."""
        return 3, self.vocab - 2

    @property
    def kv_width(self) -> int:
        """Width of one token's keys in one layer."""
        return self.width // self.heads * (self.kv_heads or self.heads)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.gpu_gib else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.gpu_gib else torch.float32

    @property
    def half_depth(self) -> int:
        """The layer after which half of the layers are left: where the second stage acts."""
        return self.layers // 2 - 1

    def noise_share(self, batch: int) -> Tensor:
        """(batch,) share of noise in each image."""
        low, high = self.noise_shares
        return (torch.arange(batch) + 0.5) / batch * (high - low) + low
