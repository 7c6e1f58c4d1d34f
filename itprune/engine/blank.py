"""Nothing, made by the whole encoder: what a batch of text adds to its embeddings, so that every
rank runs the same modules and every trained weight gets a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from itprune.families.base import Family

INSIDE = ("last_hidden_state", "hidden_states", "attentions")
"""What an encoder's output tells of its inside: no part of the sequence, and partly unused."""


def nothing(family: Family, embeds: Tensor) -> Tensor:
    """A zero of the dtype of `embeds` that depends on all a blank image adds to a sequence."""
    model: Any = family.model
    output = model.get_image_features(**family.blank_image(), return_dict=True)
    # Some versions of some models leave the features an attribute that is no entry of the output.
    made = _tensors([output, output.pooler_output])
    parts = [0.0 * tensor.sum() for tensor in made if tensor.requires_grad]
    return sum(parts, embeds.new_zeros(())).to(embeds.dtype)


def _tensors(output: Any) -> Iterator[Tensor]:
    """All features of an output: some encoders make more than one level of them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | list | tuple):
        named = output.items() if isinstance(output, Mapping) else enumerate(output)
        for name, part in named:
            if name not in INSIDE:
                yield from _tensors(part)
