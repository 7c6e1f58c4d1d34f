"""`quecc`: the image is compressed by what the question asks (QueCC, arXiv 2411.03312).

The question alone runs through the LLM; its last token's state is added to the patches, which a
strided depth-wise convolution turns into a coarse grid of queries. Each query attends to its own
block of k x k patches, read at four depths of the encoder, and its answer goes on into the model's
projector. k = 4, 6, 12, 24 leave 36, 16, 4, 1 of 24 x 24 tokens.

An image without a question (caption pretraining) is compressed without one: only instruction
tokens count, never an answer. In the published code, a caption could become its own query.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from itprune.host import Host
from itprune.maths.grids import block_order, patch_rows
from itprune.maths.querying import QuestionCompressor
from itprune.methods import register_method
from itprune.methods.base import Card
from itprune.methods.fixed_size import FixedSize
from itprune.options import check_positive
from itprune.tokens import Images, Kept, fill, spread

PUBLISHED_KERNEL = 6
PUBLISHED_STATES = (12, 16, 22)
PUBLISHED_DEPTH = 24
"""The publication reads hidden states 12, 16, 22 and 23 of 24 blocks; the last one is the feature
block's output."""


@dataclass(frozen=True)
class QueccOptions:
    """Options of `quecc`."""

    kernel: int | None = None
    """Side of the block of patches that becomes one token; must divide the grid. null: the one
    whose 1 / kernel² is nearest to prune.keep (6 without a keep)."""
    heads: int = 8
    """Attention heads; must divide the vision encoder's width."""

    def __post_init__(self) -> None:
        check_positive("prune.kernel", self.kernel)
        check_positive("prune.heads", self.heads)


@register_method("quecc")
class Quecc(FixedSize):
    """Question-conditioned convolution queries over blocks of patches."""

    Options = QueccOptions
    card = Card(
        "a trained compressor: one token per block of patches, weighted by the question",
        paper="2411.03312",
        training="required",
        needs=("question", "grid"),
        notes=(
            "Published weights load; the published MLP behind it is the model's own projector. A "
            "keep takes the kernel whose share is nearest. "
            "Ours: it starts near the blocks' mean, depths scale with the encoder, and an image "
            "without a question is compressed without one."
        ),
    )
    needs_patches = True
    places = ("before_llm",)
    positions = "contiguous"
    needs_question = True
    size_option = "kernel"

    def __init__(self, options: QueccOptions, host: Host) -> None:
        super().__init__(options, host)
        width = host.vision_width
        if width % options.heads:
            raise ValueError(
                f"prune.heads: {options.heads} does not divide the vision width {width}"
            )
        self.levels = _levels(host)
        self.size = options.kernel or PUBLISHED_KERNEL
        self.compressor = QuestionCompressor(
            width, width * len(self.levels), host.width, options.heads, self.size
        )

    def vision_blocks(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.levels)))

    # ------------------------------------------------------------------------------- size
    def size_for(self, keep: float | None) -> int:
        rows, columns = self.host.grid
        if self.options.kernel is not None:
            _check_kernel(self.options.kernel, rows, columns)
            return int(self.options.kernel)
        target = PUBLISHED_KERNEL**-2 if keep is None else keep
        choices = _divisors(rows, columns)[1:]
        if not choices:
            raise ValueError(
                f"prune.method: quecc needs rows and columns with a common divisor, and this "
                f"model's images have {rows} x {columns} patches; choose another method"
            )
        return min(choices, key=lambda kernel: abs(kernel**-2 - target))

    def resize(self, size: int) -> None:
        self.size = size
        self.compressor.resize(size)

    def stored_size(self, state: Mapping[str, Tensor], prefix: str) -> int | None:
        weight = state.get(f"{prefix}compressor.q_downsample.weight")
        return None if weight is None else weight.shape[-1]

    # ------------------------------------------------------------------------------- compression
    def before_llm(self, images: Images) -> Kept:
        """One token per block, in raster order.

        Raises:
            ValueError: the kernel does not divide an image's grid.
        """
        for rows, columns in images.grid.unique(dim=0).tolist():
            _check_kernel(self.size, rows, columns)
        single = images.features[patch_rows(images)]
        levels = torch.cat([self._level(images, block, single) for block in self.levels], 1)
        area = self.size**2
        count = images.grid.prod(1) // area
        order = block_order(images.grid, self.size)
        weight = self.compressor.clip_attn.in_proj_weight
        rows = self.compressor(
            single[order].unflatten(0, (-1, area)).to(weight.dtype),
            levels[order].unflatten(0, (-1, area)).to(weight.dtype),
            images.question().detach().to(weight.dtype),
            torch.repeat_interleave(count),
        )
        return fill(images, spread(images.slots, count), rows.to(images.features.dtype))

    @staticmethod
    def _level(images: Images, block: int, single: Tensor) -> Tensor:
        """(V, D) patch states behind one encoder block."""
        if block == images.feature_block:
            return single
        hidden = images.block(block).hidden[:, int(images.has_cls) :].flatten(0, 1)
        if len(hidden) != len(single):
            raise ValueError(
                f"prune.method: quecc needs one patch of the vision encoder for each visual token, "
                f"and here {len(hidden)} patches became {len(single)} tokens"
            )
        return hidden.to(single.dtype)


def _levels(host: Host) -> tuple[int, ...]:
    """Encoder blocks read, ascending, the feature block last."""
    scale = host.vision_blocks / PUBLISHED_DEPTH
    last = host.feature_block
    early = (math.floor(state * scale + 0.5) - 1 for state in PUBLISHED_STATES)
    return (*(min(max(block, 0), last) for block in early), last)


def _divisors(rows: int, columns: int) -> list[int]:
    both = math.gcd(rows, columns)
    return [k for k in range(1, both + 1) if both % k == 0]


def _check_kernel(kernel: int, rows: int, columns: int) -> None:
    choices = _divisors(rows, columns)
    if kernel not in choices:
        raise ValueError(
            f"prune.kernel: {kernel} does not divide the grid of {rows} x {columns} patches; use "
            f"one of {', '.join(map(str, choices))}"
        )
