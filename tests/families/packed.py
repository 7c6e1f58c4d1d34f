"""Weights instead of mere support: how much of each patch the host packs into each slot.

For hosts that cut, resize and pool projected features; `tests.families.paths` says which patches
of the encoder flow into a token at all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from itprune.geometry import Geometry


def weights_of_the_host(model: PreTrainedModel, call: Callable[[], Tensor]) -> Tensor:
    """(S, P) how much of each patch's projected feature every slot of (S, W) features holds."""
    leaf: list[Tensor] = []

    def cut(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        leaf.append(output.detach().requires_grad_())
        return leaf[0]

    handle = model.model.multi_modal_projector.register_forward_hook(cut)
    try:
        slots = call()
    finally:
        handle.remove()
    rows = [torch.autograd.grad(slot[0], leaf[0], retain_graph=True)[0] for slot in slots]
    return torch.stack([row[..., 0].flatten() for row in rows])


def weights_of(geometry: Geometry, patches: int) -> Tensor:
    """(V, P) the weights `pool` averages patches with."""
    return torch.autograd.functional.jacobian(geometry.pool, torch.rand(patches))
