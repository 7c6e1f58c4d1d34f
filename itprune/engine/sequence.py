"""Sequence: what is known about each position of the host's input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from itprune.engine.rows import Rows


@dataclass
class Sequence:
    """The host's sequence: one (B, S) mask per fact."""

    valid: Tensor
    """Not padding."""
    visual: Tensor
    protected: Tensor
    """Never dropped."""
    instruction: Tensor
    """Text of the first user turn."""
    asks: Tensor
    """Instruction tokens behind the first visual one."""
    last: Tensor
    """The last instruction token of each row."""
    padding_mask: Tensor | None
    """(B, past + S) as the host got it; None: no padding."""

    def at(self, name: str, rows: Rows) -> Tensor:
        """(N,) one of the masks, for the tokens alive."""
        return {
            "visual": self.visual,
            "protected": self.protected,
            "instruction": self.instruction,
            "asks": self.asks,
            "last": self.last,
        }[name].reshape(-1)[rows.token]

    def every(self, step: int) -> Sequence:
        """Every `step`-th row."""
        mask = self.padding_mask
        return Sequence(
            self.valid[::step],
            self.visual[::step],
            self.protected[::step],
            self.instruction[::step],
            self.asks[::step],
            self.last[::step],
            None if mask is None else mask[::step],
        )

    def rows(self, embeds: Tensor, packed: bool) -> Rows | None:
        """What layer 0 runs on: no padding, no visual slot that stage 1 left empty (all zeros).

        Args:
            embeds: (B, S, D).
            packed: the layout.

        Returns:
            None: nothing is to be left out.

        Raises:
            ValueError: a slot that must stay is empty.
        """
        keep = self.valid.clone()
        keep[self.visual] = (embeds.detach()[self.visual] != 0).any(-1)
        if bool(keep.all()):
            return None
        if bool((self.protected & self.valid & ~keep).any()):
            raise ValueError("a prompt ends with an image; put some text behind it")
        token = keep.reshape(-1).nonzero()[:, 0]
        return Rows(token, keep.shape[0], keep.shape[1], packed)
