"""Rows: the ragged list of tokens a layer really runs on, and its two physical layouts.

Legend: B samples, S virtual length, N tokens alive of all samples, L longest sample, D width.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from itprune.ragged import group_sizes


class Rows:
    """Tokens alive, as sorted flat virtual positions b * S + s.

    Attributes:
        token: (N,) int64.
        packed: True: layers see (1, N, D); False: (B, L, D), pads on the right.
        ids: (N,) position id of each token; None: the host's.
    """

    def __init__(self, token: Tensor, samples: int, length: int, packed: bool) -> None:
        self.token, self.samples, self.length, self.packed = token, samples, length, packed
        self.ids: Tensor | None = None

    @classmethod
    def of(cls, valid: Tensor) -> Rows:
        """All tokens of (B, S) that are no padding."""
        samples, length = valid.shape
        return cls(valid.reshape(-1).nonzero()[:, 0], samples, length, packed=False)

    @cached_property
    def sample(self) -> Tensor:
        """(N,) sample of each token."""
        return torch.div(self.token, self.length, rounding_mode="floor")

    @cached_property
    def position(self) -> Tensor:
        """(N,) virtual position of each token within its sample."""
        return self.token % self.length

    @cached_property
    def gap(self) -> int:
        """Position up to which tokens are missing between others; 0: none is."""
        jump = (self.token.diff() > 1) & (self.sample.diff() == 0)
        behind = self.position[1:][jump]
        return int(behind.max()) if len(behind) else 0

    @cached_property
    def lens(self) -> Tensor:
        """(B,) tokens alive in each sample."""
        return group_sizes(self.sample, self.samples)

    @cached_property
    def lens_list(self) -> list[int]:
        """`lens` on the host: the one synchronisation a drop costs."""
        return self.lens.tolist()

    @cached_property
    def offsets(self) -> Tensor:
        """(B + 1,) int32 start of each sample in the packed row, as variable-length kernels ask."""
        return F.pad(self.lens.cumsum(0), (1, 0)).to(torch.int32)

    @property
    def aligned(self) -> bool:
        """True when all samples have the same number of tokens: the padded layout has no pads."""
        return min(self.lens_list) == max(self.lens_list)

    @cached_property
    def slot(self) -> Tensor:
        """(N,) place of each token in a flattened (B, L) table."""
        start = self.lens.cumsum(0) - self.lens
        column = torch.arange(len(self.token), device=self.token.device) - start[self.sample]
        return self.sample * max(self.lens_list) + column

    @cached_property
    def filled(self) -> Tensor:
        """(B, L) True where a token stands, False for alignment pads."""
        width = torch.arange(max(self.lens_list), device=self.token.device)
        return width < self.lens[:, None]

    @cached_property
    def table(self) -> Tensor:
        """(B, L) virtual position of each entry; pads repeat the sample's first, so that their
        rows attend to something."""
        table = self.pad(self.position[:, None])[..., 0]
        return torch.where(self.filled, table, table[:, :1])

    def pad(self, flat: Tensor) -> Tensor:
        """(N, ...) -> (B, L, ...), zeros at alignment pads."""
        shape = (self.samples, max(self.lens_list))
        if shape[0] * shape[1] == len(flat):
            return flat.view(*shape, *flat.shape[1:])
        out = flat.new_zeros(shape[0] * shape[1], *flat.shape[1:])
        return out.index_copy(0, self.slot, flat).view(*shape, *flat.shape[1:])

    def shape(self, flat: Tensor) -> Tensor:
        """(N, D) -> what a layer sees."""
        return flat[None] if self.packed else self.pad(flat)

    def flat(self, hidden: Tensor) -> Tensor:
        """The reverse of `shape`: (1, N, D) or (B, L, D) -> (N, D)."""
        if self.packed:
            return hidden[0]
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat if len(flat) == len(self.token) else flat[self.slot]

    def gather(self, virtual: Tensor) -> Tensor:
        """(1 or B, S, d) in virtual positions -> physical (1, N, d) or (B, L, d)."""
        if self.packed:
            full = virtual.expand(self.samples, -1, -1).reshape(-1, virtual.shape[-1])
            return full[self.token][None]
        row = torch.arange(self.samples, device=self.token.device)[:, None]
        return virtual.expand(self.samples, -1, -1)[row, self.table]

    def scatter(self, hidden: Tensor) -> Tensor:
        """Physical rows -> (B, S, D), zeros where a token was dropped."""
        flat = self.flat(hidden)
        out = flat.new_zeros(self.samples * self.length, flat.shape[-1])
        return out.index_copy(0, self.token, flat).view(self.samples, self.length, -1)

    def select(self, keep: Tensor) -> Rows:
        """The rows left by a (N,) mask."""
        return Rows(self.token[keep], self.samples, self.length, self.packed)
