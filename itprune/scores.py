"""Scores: how much a token matters, from one recomputed row block of one layer's q and k.

No score forces eager attention on a model: only the wanted rows of softmax(q k^T) are computed,
under no_grad, from the tensors the layer's own attention received. Legend: n images, H heads,
T tokens of the encoder (CLS first where there is one), P patches, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_LOGITS = {"cpu": 1 << 21, "cuda": 1 << 24}
"""Attention logits held at a time: 8 MiB that stay in a CPU's cache, 64 MiB on a GPU, where every
launch counts."""

MOST_QUERIES = 1024
"""Tokens of an image whose attention is averaged."""


@torch.no_grad()
def cls_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention of CLS to the patches, mean over heads.

    Args:
        query: (n, H, T, d), CLS at index 0.
        key: (n, H, T, d).
        scale: softmax scale of the layer.

    Returns:
        (n, T - 1) float32; the CLS-to-CLS entry is left out without renormalising.
    """
    # Heads side by side, as the projection left them: one product with a block-diagonal query
    # instead of one a head, which would copy all keys.
    heads = query[:, :, 0]
    block = torch.diag_embed(heads.transpose(1, 2)).transpose(1, 2).flatten(1, 2)  # (n, H d, H)
    logits = (key.transpose(1, 2).flatten(2) @ block).float() * scale  # (n, T, H)
    return torch.softmax(logits, 1)[:, 1:].mean(2)


@torch.no_grad()
def cls_attention_full_width(query: Tensor, key: Tensor) -> Tensor:
    """Attention of CLS to the patches as one head of the whole width, scale 1/sqrt(width).

    The arithmetic PruMerge-style code uses. Shapes as in `cls_attention`.
    """
    q = query[:, :, :1].transpose(1, 2).flatten(2)  # (n, 1, H d)
    k = key.transpose(1, 2).flatten(2)  # (n, T, H d)
    logits = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    return torch.softmax(logits, -1)[:, 0, 1:]


@torch.no_grad()
def cls_cosine(hidden: Tensor) -> Tensor:
    """Cosine of CLS and each patch: (n, T, D) hidden states -> (n, T - 1) float32."""
    h = F.normalize(hidden.float(), dim=-1)
    return (h[:, 1:] @ h[:, :1].transpose(1, 2))[..., 0]


@torch.no_grad()
def attention_received(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Mean attention each token receives: the substitute where an encoder has no CLS.

    Images of more than `MOST_QUERIES` tokens are asked by that many of them, evenly spaced: a mean
    over a thousand rows hardly moves, and the whole map would cost as much as a block of the tower.

    Args:
        query: (n, H, T, d).
        key: (n, H, T, d).
        scale: softmax scale of the layer.
        mask: (n, 1, T, T) bool, True = seen; None: everything. What nobody sees asks nothing.

    Returns:
        (n, T) float32.
    """
    images, heads, length, _ = query.shape
    asking = torch.ones(images, length, dtype=torch.bool, device=query.device)
    if mask is not None:
        asking = mask[:, 0].any(1)
    index = torch.arange(length, device=query.device)
    if length > MOST_QUERIES:
        index = torch.arange(MOST_QUERIES, device=query.device) * length // MOST_QUERIES
    total = query.new_zeros(images, length, dtype=torch.float32)
    # A few rows of queries at a time: a map of all of them would not fit for thousands of patches.
    most = MOST_LOGITS.get(query.device.type, MOST_LOGITS["cuda"])
    for part in index.split(max(most // max(images * heads * length, 1), 1)):
        logits = (query[:, :, part] @ key.transpose(-1, -2)).float().mul_(scale)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, :, part], -1e30)
        attention = torch.softmax(logits, -1)
        total += torch.einsum("nhqt,nq->nt", attention, asking[:, part].float())
    count = asking[:, index].sum(1, keepdim=True).clamp(min=1)
    return total / (heads * count)
