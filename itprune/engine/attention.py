"""Named attention implementations: the host's own kernel, plus packed rows and a tap.

Registered through transformers' public interface under `itprune_<base>` and set on one model only.
What a layer needs travels with its call as one keyword, so a recomputed layer (gradient
checkpointing) sees exactly what it saw the first time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from itprune.engine.masks import added_mask
from itprune.engine.rows import Rows

KEYWORD = "itprune_call"
PREFIX = "itprune_"
SUPPORTED = ("sdpa", "flash_attention_2", "flash_attention_3")

Tap = Callable[[Tensor, Tensor, float], None]
"""Receives query (B, H, L, d), key (B, H_kv, L, d) and the softmax scale of one layer."""


@dataclass(frozen=True)
class Split:
    """Which rows of a (B, L, D) tensor are what, as indices b * L + l. Others are filling."""

    text: Tensor
    visual: Tensor
    share: float
    """Of the feed-forward channels, for visual rows."""


@dataclass(frozen=True)
class AttentionCall:
    """What one attention call carries."""

    rows: Rows | None = None
    """Packed rows; None: the host's layout."""
    tap: Tap | None = None
    only_tap: bool = False
    """Nothing is attended to: the call exists for its q and k."""
    isolated: int = 0
    """Trailing tokens of an encoder that see everything and are seen by themselves only."""
    attend: Callable[[Tensor, Tensor, Tensor, float, float], Tensor] | None = None
    """query, key, value, scale, dropout -> (B, L, H, d): takes the place of the host's kernel."""
    split: Split | None = None
    """What the feed-forward block behind this attention runs narrower; None: nothing."""


def pruned_name(base: str, eager: Callable[..., Any] | None = None) -> str:
    """Registers (once) and returns the implementation that wraps `base`.

    Args:
        base: the implementation's name.
        eager: what the model itself calls `eager`; None: that is refused.

    Raises:
        ValueError: an attention implementation that cannot be wrapped.
    """
    if base == "eager" and eager is not None:
        return _registered(f"{PREFIX}eager_{eager.__module__.rpartition('.')[2]}", base, eager)
    if base not in SUPPORTED:
        raise ValueError(
            f"attention implementation {base!r} is not supported; load the model with "
            f"attn_implementation set to one of: {', '.join(SUPPORTED)}"
        )
    return _registered(PREFIX + base, base, ALL_ATTENTION_FUNCTIONS[base])


def _registered(name: str, base: str, host: Callable[..., Any]) -> str:
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, _wrap(base, host))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _wrap(base: str, host: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    varlen_by_host = "flash" in base

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        call: AttentionCall = kwargs.pop(KEYWORD, None) or AttentionCall()
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if call.tap is not None:
            _tap(call.tap, query.detach(), key.detach(), scale, kwargs.get("cu_seq_lens_q"))
        if call.only_tap:
            return torch.zeros_like(query).transpose(1, 2), None
        if call.attend is not None:
            return call.attend(query, key, value, scale, dropout), None
        if call.isolated:
            return isolated_attention(query, key, value, call.isolated, scale, dropout), None
        if call.rows is not None and not varlen_by_host:
            return packed_attention(query, key, value, call.rows, scale, dropout), None
        if call.rows is not None:
            attention_mask, longest = None, max(call.rows.lens_list)
            kwargs.update(
                cu_seq_lens_q=call.rows.offsets,
                cu_seq_lens_k=call.rows.offsets,
                max_length_q=longest,
                max_length_k=longest,
            )
        if base == "eager" and attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = added_mask(attention_mask, query.dtype)
        return host(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )

    return attention


def _tap(tap: Tap, query: Tensor, key: Tensor, scale: float, offsets: Tensor | None) -> None:
    """Several images in one row, as variable-length kernels have them, are tapped one by one."""
    if offsets is None:
        return tap(query, key, scale)
    lens = offsets.diff().tolist()
    for q, k in zip(query.split(lens, 2), key.split(lens, 2), strict=True):
        tap(q, k, scale)


def isolated_attention(
    query: Tensor, key: Tensor, value: Tensor, count: int, scale: float, dropout: float
) -> Tensor:
    """Encoder attention in which the last `count` tokens are invisible to all others.

    Args:
        query, key, value: (n, H, T + count, d).

    Returns:
        (n, T + count, H, d); the first T rows are what they are without the others.
    """
    own = query.shape[2] - count
    parts = [
        F.scaled_dot_product_attention(q, k, v, scale=scale, dropout_p=dropout)
        for q, k, v in (
            (query[:, :, :own], key[:, :, :own], value[:, :, :own]),
            (query[:, :, own:], key, value),
        )
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float, dropout: float
) -> Tensor:
    """Causal attention within each sample of a packed row: sum(n_i^2) work, no N x N mask.

    Args:
        query: (1, H, N, d).
        key, value: (1, H_kv, N, d).

    Returns:
        (1, N, H, d).
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.is_cuda and half and dropout == 0.0:
        return _varlen_kernel(query, key, value, rows, scale)
    grouped = query.shape[1] != key.shape[1]
    parts = zip(*(t.split(rows.lens_list, dim=2) for t in (query, key, value)), strict=True)
    out = [
        F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=grouped
        )
        for q, k, v in parts
    ]
    return torch.cat(out, dim=2).transpose(1, 2)


def _varlen_kernel(query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float) -> Tensor:
    """torch's own variable-length flash kernel: no flash-attn package needed."""
    from torch.nn.attention.varlen import (
        varlen_attn,  # absent from CPU-only builds of some versions
    )

    longest = max(rows.lens_list)
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        rows.offsets,
        rows.offsets,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[None]
