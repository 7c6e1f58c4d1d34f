"""How long a sample will be, told from its record alone, and what it costs.

A batch is planned before its samples are read, on every rank alike. Text tokens are estimated by a
straight line over the bytes of the text, visual tokens by a mean for each image, what a pruner
keeps of them by `prune.keep` times a factor. The three are least squares over the samples and
steps seen so far. All sums are whole numbers: added in whatever order, by whichever rank, before or
after a checkpoint, they are the same, and so is every plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

SCALE = 10**6
"""Fractions are counted in millionths, as whole numbers."""


class Outline(NamedTuple):
    """What a record tells at once."""

    bytes: int
    """Of its texts, in UTF-8."""
    images: int


class Size(NamedTuple):
    """Tokens of an encoded sample."""

    text: int
    visual: int


@dataclass(frozen=True)
class Sums:
    """What has been seen of samples and steps; adds up over ranks and time."""

    samples: int = 0
    bytes: int = 0
    bytes_squared: int = 0
    text: int = 0
    text_bytes: int = 0
    text_squared: int = 0
    images: int = 0
    images_squared: int = 0
    visual: int = 0
    visual_images: int = 0
    visual_squared: int = 0
    pruned: int = 0
    """Visual tokens of steps that pruned."""
    aimed: int = 0
    """The same times the `keep` in force, in millionths."""
    layered: int = 0
    """The same as the pruner counted them, summed over layers."""
    kept: int = 0
    """What was left of these."""

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @classmethod
    def of(cls, outline: Outline, size: Size) -> Sums:
        """One sample."""
        return cls(
            samples=1,
            bytes=outline.bytes,
            bytes_squared=outline.bytes**2,
            text=size.text,
            text_bytes=size.text * outline.bytes,
            text_squared=size.text**2,
            images=outline.images,
            images_squared=outline.images**2,
            visual=size.visual,
            visual_images=size.visual * outline.images,
            visual_squared=size.visual**2,
        )

    def to_list(self) -> list[int]:
        return list(astuple(self))

    @classmethod
    def from_list(cls, values: Sequence[int]) -> Sums:
        """Raises ValueError when the list is not one of ours."""
        if len(values) != len(fields(cls)):
            raise ValueError(f"expected {len(fields(cls))} sums, got {len(values)}")
        return cls(*(int(value) for value in values))


class Cost(NamedTuple):
    """Tokens a sample takes up, and how far off that may be."""

    tokens: float
    variance: float


@dataclass(frozen=True)
class Lengths:
    """The estimate fitted to sums; a pure function of them."""

    base: float
    """Text tokens of a sample without text."""
    per_byte: float
    per_image: float
    """Visual tokens of an image, before pruning."""
    factor: float
    """What pruned steps kept, over what they aimed at."""
    text_variance: float
    image_variance: float
    """Of the visual tokens of a sample with one image."""

    @classmethod
    def fit(cls, sums: Sums) -> Lengths:
        """Least squares; without samples that differ, their mean."""
        n = max(sums.samples, 1)
        spread = n * sums.bytes_squared - sums.bytes**2
        slope = (n * sums.text_bytes - sums.bytes * sums.text) / spread if spread else 0.0
        base = (sums.text - slope * sums.bytes) / n
        text_left = sums.text_squared - base * sums.text - slope * sums.text_bytes
        per_image = sums.visual_images / sums.images_squared if sums.images_squared else 0.0
        image_left = sums.visual_squared - per_image * sums.visual_images
        return cls(
            base=base,
            per_byte=slope,
            per_image=per_image,
            factor=_factor(sums),
            text_variance=max(text_left / n, 0.0),
            image_variance=max(image_left / sums.images_squared, 0.0)
            if sums.images_squared
            else 0.0,
        )

    def share(self, keep: float | None) -> float:
        """Share of the visual tokens that stays, over the layers, at a target.

        Args:
            keep: the target in force; None: a method's own rule decides.
        """
        if keep == 1.0:
            return 1.0
        return min(1.0, self.factor * (1.0 if keep is None else keep))

    def cost(self, outline: Outline, share: float) -> Cost:
        """What a sample takes up where `share` of its visual tokens stays."""
        text = max(self.base + self.per_byte * outline.bytes, 1.0)
        visual = self.per_image * outline.images * share
        variance = self.text_variance + (outline.images * share) ** 2 * self.image_variance
        return Cost(text + visual, variance)


def _factor(sums: Sums) -> float:
    if not sums.layered or not sums.aimed:
        return 1.0
    return sums.kept * sums.pruned * SCALE / (sums.layered * sums.aimed)


def margin(variance: float) -> float:
    """Tokens left free so that a batch hardly ever turns out longer than planned."""
    return 2 * sqrt(variance)


def measure(ids: Tensor, mask: Tensor, visual_ids: Tensor) -> list[Size]:
    """The sizes of the rows of a batch.

    Args:
        ids: (B, T) token ids.
        mask: (B, T) 1 where a token is no padding.
        visual_ids: placeholders of visual tokens.
    """
    visual = torch.isin(ids, visual_ids).sum(1)
    text = mask.sum(1) - visual
    return [Size(t, v) for t, v in zip(text.tolist(), visual.tolist(), strict=True)]


def kept_tokens(sample: dict[str, Any], visual_ids: Tensor, share: float) -> float:
    """What an encoded sample takes up where `share` of its visual tokens stays."""
    ids = sample["input_ids"]
    visual = int(torch.isin(ids, visual_ids).sum())
    return len(ids) - visual * (1 - share)
