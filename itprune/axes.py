"""Position ids of prompts, for models with one axis and for those with several (M-RoPE)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from itprune.inputs import PER_TOKEN


def axes_ids(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Position ids of one prompt, for a model with several axes.

    Its own bookkeeping is one offset kept on the model, which another prompt on it changes and
    which knows no image behind a cached one.

    Args:
        model: the transformers model.
        inputs: (T,) inputs of tokens, and those of images.

    Returns:
        (4, 1, T), those of text first.
    """
    given = {k: v[None] if k in PER_TOKEN else v for k, v in inputs.items()}
    text = torch.arange(given["input_ids"].shape[1])[None, None]
    if any(key.endswith("_grid_thw") for key in given):
        needed = {k: v for k, v in given.items() if not k.startswith("pixel_values")}
        vision, _ = model.base_model.get_rope_index(**needed)
    else:
        vision = text.expand(3, -1, -1)
    return torch.cat([text, vision])
