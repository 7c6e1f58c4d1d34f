"""Reading a vision encoder's tables: what CLS pays to the patches, the patches' keys and features.

An encoder gives one rectangular table for all images of a forward, so everything here is (n, P, …):
n images of P patches. Legend: T encoder tokens (CLS first where there is one), H heads, d head
width, D feature width, c the CLS tokens among the visual tokens (0, or 1 where the model feeds CLS
to the language model, too).
"""

from __future__ import annotations

import torch
from torch import Tensor

from itprune.options import check_choice
from itprune.tokens import Images, Kept, fill, spread

PATCH_SCORES = ("attention", "full_width")
"""How CLS attention is read: mean over the heads, or one head of the whole width."""


@torch.no_grad()
def patch_attention(images: Images, block: int, score: str = "attention") -> Tensor:
    """Attention of CLS to the patches in one block.

    Args:
        images: the images of a forward.
        block: 0-based encoder block.
        score: one of `PATCH_SCORES`. An encoder without CLS is scored by the mean attention each
            patch receives, whatever this says.

    Returns:
        (n, P) float32.

    Raises:
        ValueError: an unknown score.
    """
    check_choice("score", score, PATCH_SCORES)
    return images.patch_score(score, block)


@torch.no_grad()
def patch_keys(images: Images, block: int) -> Tensor:
    """(n, H, P, d) keys of the patches in one block, float32."""
    return images.block(block).key[:, :, int(images.has_cls) :].float()


def split_features(images: Images, patches: int) -> tuple[Tensor, Tensor]:
    """The features as tables, differentiable.

    Args:
        images: the images of a forward.
        patches: P, patches of each image in the encoder.

    Returns:
        (n, c, D) CLS features that are visual tokens themselves, (n, P, D) patch features.

    Raises:
        ValueError: the encoder's patches are not the visual tokens one by one.
    """
    count = max(len(images.lens), 1)
    length, odd = divmod(len(images.features), count)
    if odd or length - patches not in (0, 1):
        raise ValueError(
            f"prune.method: needs one patch of the vision encoder for each visual token, and here "
            f"{patches} patches became {length} tokens; choose a method that reads features alone"
        )
    table = images.features.view(len(images.lens), length, -1)
    return table[:, : length - patches], table[:, length - patches :]


def place(images: Images, rows: Tensor, real: Tensor, own: Tensor | None = None) -> Kept:
    """Puts the new tokens of every image into slots, in the order given.

    Args:
        images: the images of a forward.
        rows: (n, K, D) tokens, differentiable.
        real: (n, K) bool: which of them exist.
        own: (n, slots of an image) bool: the slots to use, as many as there are tokens; None:
            evenly spaced ones.
    """
    keep = spread(images.slots, real.sum(1)) if own is None else own.flatten()
    return fill(images, keep, rows[real])


def ranked(score: Tensor, count: int) -> Tensor:
    """(n, P) scores -> (n, count) places of the highest, highest first; ties: the earlier place."""
    return score.argsort(dim=1, descending=True, stable=True)[:, :count]


def mask_of(places: Tensor, width: int) -> Tensor:
    """(n, k) places -> (n, width) bool, True there."""
    mask = torch.zeros(len(places), width, dtype=torch.bool, device=places.device)
    return mask.scatter(1, places, True)


def places_of(mask: Tensor) -> Tensor:
    """(n, P) bool with k True in every row -> (n, k) their places, ascending."""
    return mask.nonzero()[:, 1].view(len(mask), -1)


def with_free_slot(used: Tensor, last: bool) -> Tensor:
    """(n, P) bool: `used` and the first (or last) free place of each row that has one."""
    free = ~used.flip(1) if last else ~used
    one = free & (free.cumsum(1) == 1)
    return used | (one.flip(1) if last else one)
