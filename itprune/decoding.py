"""How answers are drawn, and when each token came.

Sampling is written as greedy search over perturbed logits (the Gumbel-max trick) with one random
stream per question. An answer therefore depends on its question and the seed alone: not on the
batch it was in, nor on where an interrupted run went on, nor on how many processes share the work.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, TopPLogitsWarper

COLDEST = 1e-20
"""What colder temperatures are taken for: nothing is random there, and colder ones would make
infinities of several scores, of which the first would win."""


@dataclass(frozen=True)
class Decoding:
    """How an answer is drawn.

    Raises:
        ValueError: a value outside its range.
    """

    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0: always the most likely token; higher: more varied."""
    top_p: float = 1.0
    """Draw only among the most likely tokens that together have this probability."""
    seed: int = 0
    """Another seed, other draws."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: must be 0 or higher, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: must be in (0, 1], got {self.top_p}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class RowSampler(LogitsProcessor):
    """Turns greedy search into sampling, with one random stream per row.

    Args:
        decoding: temperature above 0, and top_p.
        seeds: one per row, from `row_seed`.
    """

    def __init__(self, decoding: Decoding, seeds: Iterable[int]) -> None:
        self.temperature = max(decoding.temperature, COLDEST)
        self.warper = TopPLogitsWarper(decoding.top_p) if decoding.top_p < 1 else None
        self.streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, vocab) logits -> the same plus Gumbel noise: their argmax is a fair draw."""
        scores = scores.float() / self.temperature
        if self.warper is not None:
            scores = self.warper(input_ids, scores)
        width = scores.shape[-1]
        drawn = [torch.empty(width).exponential_(generator=stream) for stream in self.streams]
        return scores - torch.stack(drawn).log().to(scores.device)


def row_seed(seed: int, inputs: Iterable[Tensor]) -> int:
    """A question's own seed, from its tokens and pixels."""
    code = seed & 0xFFFFFFFF
    for tensor in inputs:
        code = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, code)
    return code


class Clock(StoppingCriteria):
    """Notes when each token of the batch was there. Never stops anything."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self.now()
        self.ticks: list[float] = []

    def now(self) -> float:
        """The time, once the device has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.ticks.append(self.now() - self.start)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
