"""Hand-made `LayerTokens`: ragged samples of text, image, text with random queries and keys.

The attention here is written down plainly, as one map over all tokens, independent of the engine's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from itprune.tokens import Kept, LayerTokens

HEADS, WIDTH = 2, 8


@dataclass(frozen=True)
class Made:
    """The tensors behind hand-made tokens."""

    sample: Tensor
    kind: Tensor
    """(N,) 0 text, 1 visual, 2 text behind the image."""
    position: Tensor
    query: Tensor
    """(H, N, d)."""
    key: Tensor
    hidden: Tensor
    entered: Tensor
    """Visual tokens of each sample before anything was taken."""

    def take(self, keep: Tensor) -> Made:
        """Some of the tokens; samples are numbered from 0 again."""
        sample = torch.unique_consecutive(self.sample[keep], return_inverse=True)[1]
        rest = (self.kind[keep], self.position[keep], self.query[:, keep], self.key[:, keep])
        left = torch.bincount(self.sample[keep], minlength=len(self.entered)) > 0
        return Made(sample, *rest, self.hidden[keep], self.entered[left])

    @property
    def scaled(self) -> Tensor:
        """(H, N, N) logits, -inf where unseen."""
        seen = (self.sample[:, None] == self.sample) & (self.position[:, None] >= self.position)
        return (self.query @ self.key.transpose(1, 2) * WIDTH**-0.5).masked_fill(~seen, -torch.inf)

    @property
    def attention(self) -> Tensor:
        """(H, N, N)."""
        return torch.softmax(self.scaled, -1)

    def heads(self, rows: Tensor, rope: bool = True) -> Tensor:
        watchers = (self.scaled[0].isfinite() & rows[:, None]).sum(0).clamp(min=1)
        return self.attention[:, rows].sum(1) / watchers

    def logits(self) -> tuple[Tensor, Tensor]:
        lens = torch.bincount(self.sample)
        filled = torch.arange(int(lens.max())) < lens[:, None]
        table = torch.full((len(lens), HEADS, *[filled.shape[1]] * 2), -torch.inf)
        for b, length in enumerate(lens.tolist()):
            own = self.sample == b
            table[b, :, :length, :length] = self.scaled[:, own][:, :, own]
        return table, filled

    def at(self, layer: int) -> LayerTokens:
        """What a method would be handed after `layer`."""
        samples = int(self.sample.max()) + 1
        ends = torch.bincount(self.sample).cumsum(0) - 1
        return LayerTokens(
            layer=layer,
            sample=self.sample,
            samples=samples,
            position=self.position,
            visual=self.kind == 1,
            entered=self.entered,
            droppable_text=torch.zeros_like(self.kind, dtype=torch.bool),
            instruction_lens=torch.zeros(samples, dtype=torch.long),
            asks=self.kind == 2,
            last=torch.zeros_like(self.kind, dtype=torch.bool).index_fill(0, ends, True),
            hidden=self.hidden,
            embedded=lambda: self.hidden,
            heads=self.heads,
            logits=self.logits,
        )


def made(*samples: tuple[int, int, int], seed: int = 0) -> Made:
    """Each sample is (text, visual, text) token counts."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(samples)
    lens = counts.sum(1)
    sample = torch.repeat_interleave(torch.arange(len(samples)), lens)
    kind = torch.repeat_interleave(torch.arange(3).repeat(len(samples)), counts.flatten())
    position = torch.cat([torch.arange(n) for n in lens.tolist()])
    query, key = torch.randn(2, HEADS, len(sample), WIDTH, generator=generator)
    hidden = torch.randn(len(sample), WIDTH, generator=generator)
    return Made(sample, kind, position, query, key, hidden, counts[:, 1])


def kept_visual(kept: Kept, tokens: LayerTokens) -> list[int]:
    """Visual tokens that go on, per sample; text always does."""
    assert bool(kept.keep[~tokens.visual].all())
    return torch.bincount(
        tokens.sample[kept.keep & tokens.visual], minlength=tokens.samples
    ).tolist()
