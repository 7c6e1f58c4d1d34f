"""What travels with a call reaches every layer as it is, whatever wraps the layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from itprune import PruneConfig, attach
from itprune.families import find_family
from tests.models import batch, tiny_llava


def copied(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """What FSDP2 does to the inputs of a layer in mixed precision, the casting left out."""

    def copy(value: Any) -> Any:
        return dataclasses.replace(value) if dataclasses.is_dataclass(value) else value

    return args, {name: copy(value) for name, value in kwargs.items()}


def test_layers_whose_inputs_are_copied_prune_alike() -> None:
    model, data = tiny_llava().eval(), batch()
    with attach(model, PruneConfig(keep=0.4)), torch.no_grad():
        expected = model(**data).logits
    for layer in find_family(model).layers:
        layer.register_forward_pre_hook(copied, with_kwargs=True, prepend=True)
    with attach(model, PruneConfig(keep=0.4)), torch.no_grad():
        assert torch.equal(model(**data).logits, expected)
