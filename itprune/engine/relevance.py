"""Relevance: the attention chosen rows pay to every token, from one layer's real q and k.

Only the rows asked for of softmax(q k^T) are computed, never an eager attention map.
Legend: B samples, H heads, L longest sample, Q most asking rows of a sample, N tokens alive, d head
width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from itprune.engine.rows import Rows


@dataclass(frozen=True)
class Tapped:
    """q and k as one layer's attention received them, rotary phase applied."""

    query: Tensor
    """(1, H, N, d) packed or (B, H, L, d)."""
    key: Tensor
    """(1, H_kv, N, d) packed or (B, H_kv, past + L, d)."""
    scale: float
    cos: Tensor
    """(1 or B, …, d_rot) in the same layout as `query`."""
    sin: Tensor


@dataclass(frozen=True)
class LayerScores:
    """Scores of the tokens alive after one layer, from what its attention received."""

    tapped: Tapped
    rows: Rows
    host_layout: bool
    """The layer ran on the host's (B, S) rows, padding included."""

    @property
    def _flat(self) -> Tensor:
        """(N,) where each token stands in a flattened (B, L) table."""
        return self.rows.token if self.host_layout else self.rows.slot

    def _query_key(self, rope: bool) -> tuple[Tensor, Tensor]:
        """(B, H, L, d) and (B, H_kv, L, d), what the cache held before left out."""
        t = self.tapped
        query, key = t.query, t.key[..., -t.query.shape[-2] :, :]
        if not rope:
            query, key = unrotate(query, t.cos, t.sin), unrotate(key, t.cos, t.sin)
        if self.rows.packed and not self.host_layout:
            query, key = (self.rows.pad(x[0].transpose(0, 1)).transpose(1, 2) for x in (query, key))
        return query, key

    def _present(self, length: int) -> Tensor:
        """(B, L) True where a token stands."""
        blank = torch.zeros(self.rows.samples * length, dtype=torch.bool, device=self._flat.device)
        return blank.index_fill(0, self._flat, True).view(self.rows.samples, length)

    @torch.no_grad()
    def heads(self, asks: Tensor, rope: bool = True) -> Tensor:
        """Attention of each sample's asking rows, averaged over those that see the token.

        Args:
            asks: (N,) bool, the asking rows.
            rope: keep the rotary phase in the scores.

        Returns:
            (H, N) float32, 0 where no asking row sees the token.
        """
        query, key = self._query_key(rope)
        flat = self._flat
        samples, heads, length, width = query.shape
        asking = Rows(flat[asks], samples, length, packed=False)
        ask_row, ask_filled = asking.table, asking.filled  # (B, Q)
        picked = query.gather(2, ask_row[:, None, :, None].expand(-1, heads, -1, width))
        logits = _logits(picked, key, self.tapped.scale)  # (B, H, Q, L)
        column = torch.arange(length, device=key.device)
        seen = (column <= ask_row[:, :, None]) & self._present(length)[:, None]
        seen &= ask_filled[:, :, None]  # (B, Q, L)
        attention = torch.softmax(logits.masked_fill(~seen[:, None], -1e30), -1)
        total = (attention * seen[:, None]).sum(2)  # (B, H, L)
        mean = total / seen.sum(1).clamp(min=1)[:, None]
        return mean.transpose(0, 1).reshape(heads, -1)[:, flat]

    @torch.no_grad()
    def logits(self) -> tuple[Tensor, Tensor]:
        """(B, H, L, L) float32 causal logits, -inf where unseen, and (B, L) where tokens stand."""
        query, key = self._query_key(rope=True)
        logits = _logits(query, key, self.tapped.scale)
        length = query.shape[2]
        present = self._present(length)
        causal = torch.ones(length, length, dtype=torch.bool, device=key.device).tril()
        seen = causal & present[:, None, :] & present[:, :, None]
        return logits.masked_fill(~seen[:, None], -torch.inf), present


def _logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(B, H, Q, d) and (B, H_kv, L, d) -> (B, H, Q, L) float32."""
    samples, heads, count, width = query.shape
    grouped = query.reshape(samples, key.shape[1], heads // key.shape[1], count, width)
    return (grouped @ key[:, :, None].transpose(-1, -2)).float().flatten(1, 2) * scale


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Takes the rotary phase (rotate-half convention) out of q or k again.

    Args:
        x: (B, H, L, d).
        cos, sin: (1 or B, L, d_rot) with d_rot <= d; a scaling inside them is divided out.
    """
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    left, right = turned.chunk(2, dim=-1)
    back = torch.cat([right, -left], dim=-1)
    return torch.cat([(turned * c + back * s) / (c * c + s * s), rest], dim=-1)
