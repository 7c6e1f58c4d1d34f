"""Collator: encoded samples become one padded batch.

Text tensors are padded on the right (the host's masks and the pruner handle either side); image
inputs are joined along their first axis, so rows may hold no, one or several images.

Shapes: B samples, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from itprune.inputs import join

BAD = "bad"
"""Key of the bad samples met while a batch was read: (index, place, reason). The trainer takes it
out before the model sees the batch."""
PLACES = "places"
"""Key of where the samples come from, FILE:LINE and the like; taken out with the bad ones."""


class Collator:
    """Pads and joins encoded samples.

    Args:
        pad_token_id: fills input_ids.
        side: right or left.
    """

    def __init__(self, pad_token_id: int, side: str = "right") -> None:
        self.pad_token_id, self.side = pad_token_id, side

    @classmethod
    def of(cls, processor: Any) -> Collator:
        """Pads as a processor's tokenizer does; with the end of a text where it names nothing."""
        tokenizer = processor.tokenizer
        pad = tokenizer.pad_token_id
        return cls(tokenizer.eos_token_id if pad is None else pad)

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns (B, T) text tensors, joined image tensors, the bad samples and the places.

        Raises:
            ValueError: images that do not fit into one tensor.
        """
        bad = [item for sample in samples for item in sample.get(BAD, ())]
        places = [sample[PLACES] for sample in samples if PLACES in sample]
        notes = {BAD: bad, PLACES: places}
        if any("input_ids" not in sample for sample in samples):
            return notes
        rows = [{k: v for k, v in sample.items() if k not in notes} for sample in samples]
        return {**notes, **join(rows, self.pad_token_id, self.side)}
