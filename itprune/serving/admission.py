"""Admission: who may join the running batch, by rows and by bytes of keys and values.

What a prompt keeps is known when it has run, and booked then; before, `keep` tells it, which is the
share of visual tokens a method aims at on average over layers. The bytes are those at the end: of
the longest answers all rows may give, with the unused space beside them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from itprune.serving.joining import room
from itprune.serving.prefilled import layer_windows
from itprune.serving.running import Batch

MB = 1e6
PADDING = 1 / 8
"""Share of a prefill that may be padding, where prompts are padded to the longest."""
PADS = 256
"""Tokens of padding that are not worth a prefill more."""


@dataclass(frozen=True)
class Admission:
    """Limits of a running batch.

    Raises:
        ValueError: a limit below 1.
    """

    kv_bytes: int
    """Keys and values of all rows."""
    rows: int = 64
    """Answers made together."""
    prompt_tokens: int = 2048
    """Prompt tokens run together, kept ones: how long running answers wait for newcomers."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")


@dataclass(frozen=True)
class Need:
    """What a request is going to take, for each layer."""

    prompt: int
    """Prompt tokens kept."""
    answer: int
    """Tokens of the longest answer."""

    @classmethod
    def of(cls, tokens: int, visual: int, keep: float, answer: int) -> Need:
        """Of a prompt.

        Args:
            tokens: of the prompt, image tokens included.
            visual: image tokens.
            keep: share of these that stays.
            answer: tokens of the longest answer.
        """
        return cls(tokens - visual + math.ceil(keep * visual), answer)

    def width(self, window: int | None) -> int:
        """Columns of a layer at the end."""
        prompt = self.prompt if window is None else min(self.prompt, window - 1)
        return prompt + self.answer


class Ledger:
    """What is taken, and what would be.

    Args:
        config: of the text model.
        dtype: of keys and values.
        limits: not to be passed.
    """

    def __init__(self, config: Any, dtype: torch.dtype, limits: Admission) -> None:
        values = config.to_dict()
        heads = values.get("num_key_value_heads") or config.num_attention_heads
        width = values.get("head_dim") or config.hidden_size // config.num_attention_heads
        self.entry = 2 * heads * width * dtype.itemsize
        """Bytes of one token in one layer."""
        self.windows = layer_windows(config)
        self.limits = limits

    def check(self, need: Need) -> None:
        """Refuses what could never join.

        Raises:
            ValueError: it takes more than there is, were it alone.
        """
        wanted = self.bytes(1, [need.width(window) for window in self.windows])
        if wanted > self.limits.kv_bytes:
            raise ValueError(
                f"the request may need {wanted / MB:.1f} MB of memory for keys and values, but "
                f"{self.limits.kv_bytes / MB:.1f} MB is the limit; ask for a shorter answer, a "
                "lower keep, or with smaller pictures"
            )

    def claim(self, batch: Batch) -> Claim:
        """What the rows of a batch take, for newcomers to claim the rest."""
        left = [row.room - len(row.said.ids) for row in batch.rows]
        places = list(zip(batch.cache.rows, left, strict=True))
        widths = [
            max((place.length(layer) + more for place, more in places), default=0)
            for layer in range(len(self.windows))
        ]
        return Claim(self, len(batch.rows), widths)

    def bytes(self, rows: int, widths: Sequence[int]) -> int:
        """Keys and values of so many rows.

        Args:
            rows: of the batch.
            widths: columns of each layer.
        """
        return sum(math.prod(room(rows, width)) for width in widths) * self.entry


@dataclass
class Claim:
    """Rows of a batch and newcomers, when all of them have ended."""

    ledger: Ledger
    rows: int
    widths: list[int]
    """Columns of each layer."""
    prompts: int = 0
    """Prompt tokens of the newcomers."""
    newcomers: int = 0
    longest: int = 0
    """Prompt tokens of the longest of them."""

    def suits(self, need: Need) -> bool:
        """Whether a prompt is about as long as those of the newcomers, so that little is padded."""
        tokens, longest = self.prompts + need.prompt, max(self.longest, need.prompt)
        padding = (self.newcomers + 1) * longest - tokens
        return padding <= max(PADS, PADDING * tokens)

    def take(self, need: Need) -> bool:
        """One more newcomer; False: it does not fit, and nothing is taken."""
        limits, windows = self.ledger.limits, self.ledger.windows
        rows, prompts = self.rows + 1, self.prompts + need.prompt
        many = self.prompts > 0 and prompts > limits.prompt_tokens
        if rows > limits.rows or many:
            return False
        pairs = zip(self.widths, windows, strict=True)
        widths = [max(width, need.width(window)) for width, window in pairs]
        if self.ledger.bytes(rows, widths) > limits.kv_bytes:
            return False
        self.rows, self.widths, self.prompts = rows, widths, prompts
        self.newcomers, self.longest = self.newcomers + 1, max(self.longest, need.prompt)
        return True


def prompt_room(device: torch.device) -> int:
    """Prompt tokens worth running together: a GPU wants many; on a CPU more than these leave its
    caches and take longer, each for itself."""
    return 8192 if device.type == "cuda" else 2048


def spare_bytes(device: torch.device) -> int:
    """Half of the memory that is free now; prompts that run through the layers need the rest."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
