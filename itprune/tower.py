"""A model without its language model: what makes visual tokens, for models that run elsewhere.

On a CPU transformers maps safetensors into memory and reads what is looked at, as long as no type
changes; so the whole model is opened, the language model's layers are let go of unread, and the
rest is moved where it belongs.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from itprune.attach import base_model


def strip(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
    """Lets go of everything behind the token embeddings, and moves what makes visual tokens.

    Args:
        model: on the CPU, without adapters; its token embeddings stay there, in their own type.
        device: of what stays.
        dtype: of what stays; None: its own.

    Returns:
        The model; its shape is known, but it can no longer answer.
    """
    whole = base_model(model)
    embeddings = whole.get_input_embeddings()
    table = embeddings.weight.detach()
    whole.get_decoder().to("meta")
    head = whole.get_output_embeddings()
    if head is not None:
        head.to("meta")
    for tensor in (*whole.parameters(), *whole.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device, dtype if tensor.is_floating_point() else None)
    embeddings.weight = nn.Parameter(table, requires_grad=False)
    return whole
