"""Collator: encoded samples become one padded batch.

Text tensors are padded on the right (the host's masks and the pruner handle either side); image
inputs are joined along their first axis, so rows may hold no, one or several images.

Shapes: B samples, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from train.data.encode import IGNORED

BAD = "bad"
"""Key of the bad samples met while a batch was read: (index, place, reason). The trainer takes it
out before the model sees the batch."""


class Collator:
    """Pads and joins encoded samples.

    Args:
        pad_token_id: fills input_ids.
        side: right or left.
    """

    def __init__(self, pad_token_id: int, side: str = "right") -> None:
        self.side = side
        self.fill = {
            "input_ids": pad_token_id,
            "attention_mask": 0,
            "labels": IGNORED,
            "token_type_ids": 0,
            "mm_token_type_ids": 0,
        }

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns (B, T) text tensors, joined image tensors and the list of bad samples."""
        bad = [item for sample in samples for item in sample.get(BAD, ())]
        if any("input_ids" not in sample for sample in samples):
            return {BAD: bad}
        keys = dict.fromkeys(key for sample in samples for key in sample if key != BAD)
        batch: dict[str, Any] = {BAD: bad}
        for key in keys:
            tensors = [sample[key] for sample in samples if key in sample]
            batch[key] = self._pad(tensors, key) if key in self.fill else torch.cat(tensors)
        return batch

    def _pad(self, rows: list[torch.Tensor], key: str) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=self.fill[key], padding_side=self.side
        )
