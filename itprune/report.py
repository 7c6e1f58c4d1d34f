"""Report: what one forward kept. The field mixes four budget figures; this prints all of them.

Tokens into the LLM, tokens averaged over layers and KV entries come from here; FLOPs and measured
time come from `itprune bench`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from torch import Tensor

LAST = 4096


@dataclass
class Segment:
    """Consecutive LLM layers that run on the same tokens."""

    start: int
    """First layer of the segment."""
    tokens: Tensor
    """(B,) tokens of each sample."""
    visual: Tensor
    """(B,) visual tokens among them."""


@dataclass
class Report:
    """Counts of one forward, per sample. Tensors stay on the device until something is read."""

    depth: int
    """LLM layers."""
    valid: Tensor
    """(B,) tokens of each sample before pruning, without padding."""
    visual: Tensor
    """(B,) visual tokens of each sample before pruning."""
    segments: list[Segment] = field(default_factory=list)

    @cached_property
    def tokens_in(self) -> list[int]:
        return self.valid.tolist()

    @cached_property
    def visual_in(self) -> list[int]:
        return self.visual.tolist()

    @cached_property
    def tokens_stage1(self) -> list[int]:
        """Tokens into the LLM."""
        return self.segments[0].tokens.tolist()

    @cached_property
    def visual_stage1(self) -> list[int]:
        return self.segments[0].visual.tolist()

    @cached_property
    def drops(self) -> dict[int, list[int]]:
        """First layer of each segment -> tokens of each sample from there on."""
        return {s.start: s.tokens.tolist() for s in self.segments}

    @cached_property
    def visual_drops(self) -> dict[int, list[int]]:
        """First layer of each segment -> visual tokens of each sample from there on."""
        return {s.start: s.visual.tolist() for s in self.segments}

    def _lengths(self) -> list[int]:
        edges = [s.start for s in self.segments] + [self.depth]
        return [b - a for a, b in pairwise(edges)]

    @cached_property
    def kv_entries(self) -> list[int]:
        """Tokens of each sample summed over layers: what a KV cache holds after the prompt."""
        parts = zip(self.drops.values(), self._lengths(), strict=True)
        per_segment = [[n * length for n in tokens] for tokens, length in parts]
        return [sum(column) for column in zip(*per_segment, strict=True)]

    @property
    def visual_layer_tokens(self) -> int:
        """Visual tokens of all samples, summed over layers."""
        parts = zip(self.visual_drops.values(), self._lengths(), strict=True)
        return sum(sum(tokens) * length for tokens, length in parts)

    @property
    def visual_shares(self) -> list[float]:
        """Fraction of the visual tokens kept, averaged over layers, of each sample that has any."""
        kept = zip(*self.visual_drops.values(), strict=True)
        lengths = self._lengths()
        return [
            sum(n * length for n, length in zip(tokens, lengths, strict=True))
            / (self.depth * whole)
            for tokens, whole in zip(kept, self.visual_in, strict=True)
            if whole
        ]

    @property
    def layer_average(self) -> float:
        """Fraction of all tokens kept, averaged over layers."""
        return sum(self.kv_entries) / (self.depth * max(sum(self.tokens_in), 1))

    @property
    def visual_layer_average(self) -> float:
        """Fraction of the visual tokens kept, averaged over layers: what `keep` aims at."""
        return self.visual_layer_tokens / (self.depth * max(sum(self.visual_in), 1))


@dataclass
class Totals:
    """Running sums over forwards, for logging."""

    samples: int = 0
    tokens_in: int = 0
    visual_in: int = 0
    visual_stage1: int = 0
    visual_stage2: int = 0
    """Visual tokens that reach the last layer."""
    tokens_llm: int = 0
    """Tokens into the LLM."""
    layer_tokens: int = 0
    """Tokens summed over layers."""
    visual_layer_tokens: int = 0
    layers: int = 0
    """LLM layers of the model."""
    shares: deque[float] = field(default_factory=lambda: deque(maxlen=LAST), repr=False)
    """Fraction of the visual tokens kept, averaged over layers, of each of the last samples."""
    _waiting: list[Report] = field(default_factory=list, repr=False)

    def add(self, report: Report) -> None:
        """Queues a report; its tensors are read at `collect`, not in the training step."""
        self._waiting.append(report)
        if len(self._waiting) >= 256:
            self.collect()

    def collect(self) -> Totals:
        """Reads the queued reports and returns itself."""
        for r in self._waiting:
            self.samples += len(r.tokens_in)
            self.tokens_in += sum(r.tokens_in)
            self.visual_in += sum(r.visual_in)
            self.visual_stage1 += sum(r.visual_stage1)
            self.visual_stage2 += sum(r.segments[-1].visual.tolist())
            self.tokens_llm += sum(r.tokens_stage1)
            self.layer_tokens += sum(r.kv_entries)
            self.visual_layer_tokens += r.visual_layer_tokens
            self.layers = r.depth
            self.shares.extend(r.visual_shares)
        self._waiting.clear()
        return self

    def reset(self) -> None:
        """Back to zero."""
        self.__init__()  # type: ignore[misc]
