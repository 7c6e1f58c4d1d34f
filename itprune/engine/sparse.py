"""Attention that spares work on visual tokens which stay (arXiv 2410.06169).

Three savings, each exact for what it means, none of them a dense mask:

- a window inside each image: blocks of grid rows attend to the rows in reach (see `scene.py`);
- heads that do not treat visual tokens: visual queries get zeros from them, and text attends to
  text only. Removed before the softmax they cost nothing; `zero_after_softmax` keeps the published
  arithmetic instead, where the visual keys stay in the denominator and their values count zero;
- blind layers, where no head treats visual tokens.

`grouped_attention` serves a forward that starts a sequence. `masked_attention` serves everything
else (decoding, continued turns, hosts with masks of their own) from an explicit mask.
Legend: B rows, L columns, H query heads, H_kv key heads, d head width; Lq, Lk queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from itprune.engine.scene import Groups, Scene
from itprune.tokens import Sparsity


@dataclass(frozen=True)
class Masked:
    """What `masked_attention` knows of queries and keys."""

    mask: Tensor
    """(B, 1, Lq, Lk) bool (True = seen) or float (added to the scores), windows included."""
    query_visual: Tensor
    """(B, Lq) bool."""
    key_visual: Tensor
    """(B, Lk) bool."""


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scene: Scene,
    spare: Sparsity,
    seeing: tuple[Groups, ...],
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Self-attention of whole sequences, in any physical layout.

    Args:
        query: (B, H, L, d).
        key, value: (B, H_kv, L, d).
        scene: where the tokens stand in (B, L).
        spare: what the layer spares.
        seeing: `scene.windowed(...)` or `scene.everything`, made once for all layers.
        scale: softmax scale.
        dropout: dropout of the attention weights.

    Returns:
        (B, L, H, d), zeros where no token stands.
    """
    samples, heads, length, width = query.shape
    visual = scene.visual
    if spare.zero_after_softmax:
        silent = torch.zeros(samples * length, dtype=torch.bool, device=visual.device)
        silent[scene.place[visual]] = True
        value = _silence(value, silent.view(samples, length), spare, heads)
    q, k, v = _flat(query), _flat(key), _flat(value)

    def run(groups: tuple[Groups, ...], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [_attend(q, k, v, group, scale, dropout) for group in groups]
        out = torch.cat(parts) if len(parts) > 1 else parts[0]
        put = torch.cat([group.put for group in groups])
        return out.new_zeros(len(q), *out.shape[1:]).index_copy(0, put, out)

    treat = treating(spare, heads)
    if spare.zero_after_softmax or bool(treat.all()):
        out = run(seeing, q, k, v)
        if spare.zero_after_softmax and spare.heads is not None:
            seen = silent[:, None] & ~spare.heads.to(silent.device)
            out = out.masked_fill(seen[..., None], 0.0)
        return out.view(samples, length, heads, width)
    parts, order = [], []
    for groups, part in ((seeing, treat), (scene.among_text, ~treat)):
        index = part.nonzero()[:, 0].to(q.device)
        if len(index):
            shared = torch.div(index, heads // k.shape[1], rounding_mode="floor")
            parts.append(run(groups, q[:, index], k[:, shared], v[:, shared]))
            order.append(index)
    out = torch.cat(parts, 1)[:, torch.argsort(torch.cat(order))]
    return out.view(samples, length, heads, width)


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masked: Masked,
    spare: Sparsity,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of new tokens to all keys so far, under an explicit mask.

    Args:
        query: (B, H, Lq, d).
        key, value: (B, H_kv, Lk, d).
        masked: the mask, and what is visual.
        spare: what the layer spares.
        scale: softmax scale.
        dropout: dropout of the attention weights.

    Returns:
        (B, Lq, H, d).
    """
    heads = query.shape[1]
    treat = treating(spare, heads).to(query.device)
    mask, asks, silent = masked.mask, masked.query_visual, masked.key_visual
    if spare.zero_after_softmax:
        value = _silence(value, silent, spare, heads)
        treat = torch.ones_like(treat) if spare.heads is None else spare.heads.to(query.device)
    elif not bool(treat.all()):
        # Visual queries of such heads keep their keys, so that every row sees something.
        hidden = silent[:, None, None] & ~asks[:, None, :, None] & ~treat[:, None, None]
        if mask.dtype == torch.bool:
            mask = mask & ~hidden
        else:
            mask = mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
    out = F.scaled_dot_product_attention(
        query,
        _expand(key, heads),
        _expand(value, heads),
        attn_mask=mask,
        scale=scale,
        dropout_p=dropout,
    )
    out = out.masked_fill((asks[:, None] & ~treat[:, None])[..., None], 0.0)
    return out.transpose(1, 2)


def treating(spare: Sparsity, heads: int) -> Tensor:
    """(H,) bool, on the CPU: heads that treat visual tokens."""
    if spare.blind:
        return torch.zeros(heads, dtype=torch.bool)
    return torch.ones(heads, dtype=torch.bool) if spare.heads is None else spare.heads.cpu()


def _silence(value: Tensor, silent: Tensor, spare: Sparsity, heads: int) -> Tensor:
    """(B, H or H_kv, L, d): the values of visual keys, zero in heads that do not treat them.

    A weight times zero after the softmax is the weight times a value of zero.
    """
    if spare.blind:
        return value.masked_fill(silent[:, None, :, None], 0.0)
    if spare.heads is None:
        return value
    off = silent[:, None] & ~spare.heads.to(silent.device)[:, None]
    return _expand(value, heads).masked_fill(off[..., None], 0.0)


def _attend(q: Tensor, k: Tensor, v: Tensor, groups: Groups, scale: float, drop: float) -> Tensor:
    """(B * L, H, d) and keys of as many or fewer heads -> (M, H, d) at `groups.put`."""
    query, key, value = (
        _gather(t, index) for t, index in ((q, groups.query), (k, groups.key), (v, groups.key))
    )
    out = F.scaled_dot_product_attention(
        query,
        _expand(key, query.shape[1]),
        _expand(value, query.shape[1]),
        attn_mask=groups.mask,
        is_causal=groups.mask is None,
        scale=scale,
        dropout_p=drop,
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, groups.take)


def _flat(t: Tensor) -> Tensor:
    """(B, H, L, d) -> (B * L, H, d)."""
    return t.transpose(1, 2).flatten(0, 1)


def _gather(flat: Tensor, index: Tensor) -> Tensor:
    """(B * L, H, d) at (G, K) -> (G, H, K, d)."""
    return flat.index_select(0, index.reshape(-1)).unflatten(0, index.shape).transpose(1, 2)


def _expand(t: Tensor, heads: int) -> Tensor:
    """(B, H_kv, L, d) -> (B, H, L, d)."""
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], 1)
