"""What a method sees and what it answers: plain tensors, no model.

Stage 1 hands a method the `Images` of a forward and gets a `Kept` back; stage 2 hands it the
`LayerTokens` after one LLM layer and gets a keep mask back. Methods and families meet here.
Legend: V visual tokens of all images together, n images, N tokens alive of all samples, B samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from itprune.ragged import group_ids


@dataclass(frozen=True)
class Images:
    """The visual tokens of one forward, before the projector."""

    features: Tensor
    """(V, D) vision features, raster order, image after image."""
    lens: Tensor
    """(n,) visual tokens of each image."""
    pixels: Tensor
    """(n, …) what the encoder saw."""
    salience: Callable[[str], Tensor]
    """Score name (attention, cosine, full_width) -> (V,) float32; higher = keep."""

    @property
    def image(self) -> Tensor:
        """(V,) which image each token belongs to."""
        return group_ids(self.lens)

    @property
    def fingerprint(self) -> Tensor:
        """(n,) int64, exact whatever the batch is: lets a seeded choice depend on the image."""
        values = (self.pixels.detach().float() * 64).round().long().flatten(1)
        place = torch.arange(1, values.shape[1] + 1, device=values.device)
        return (values * place).sum(1).abs()


@dataclass(frozen=True)
class Kept:
    """Stage 1's answer: which slots stay, and what they hold."""

    keep: Tensor
    """(V,) bool."""
    features: Tensor | None = None
    """(V, D) replacement where a kept slot holds something new (merging); None: unchanged."""


@dataclass(frozen=True)
class LayerTokens:
    """The tokens alive after one LLM layer."""

    layer: int
    sample: Tensor
    """(N,) ascending sample ids."""
    samples: int
    """B."""
    visual: Tensor
    """(N,) bool: visual tokens that some instruction token can see."""
    droppable_text: Tensor
    """(N,) bool: instruction text that may be dropped (not special, template or supervised)."""
    instruction_lens: Tensor
    """(B,) droppable text tokens in each sample's instruction before any drop."""
    relevance: Callable[[bool], Tensor]
    """rope -> (N,) float32: head-mean attention the sample's instruction tokens pay to each token,
    averaged over the instruction tokens that can see it; 0 where none can."""


def keep_all(images: Images) -> Kept:
    """The neutral answer."""
    return Kept(torch.ones(len(images.features), dtype=torch.bool, device=images.features.device))
