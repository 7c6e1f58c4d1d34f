"""What really flows from an encoder's patches into each visual token, asked of autograd.

The oracle for `feature_block` and `geometry.pool`: it runs the host's own path and shares nothing
with the families but the block's number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from itprune.families.base import Family


def support(family: Family, **arguments: Any) -> Tensor:
    """(V, P) bool: which patch features each token depends on.

    Args:
        family: of the model.
        arguments: of `get_image_features`.
    """
    leaves = []

    def cut(module: Any, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    # Prepended: hidden states the host captures must be the replaced ones.
    block = family.blocks[family.feature_block]
    handle = block.register_forward_hook(cut, prepend=True)
    try:
        output = family.model.get_image_features(**arguments, return_dict=True)
    finally:
        handle.remove()
    tokens = torch.cat([t.reshape(-1, t.shape[-1]) for t in output.pooler_output])
    weights = torch.randn(tokens.shape[-1], generator=torch.Generator().manual_seed(0))
    (leaf,) = leaves
    rows = []
    for token in tokens @ weights:
        (gradient,) = torch.autograd.grad(token, leaf, retain_graph=True)
        rows.append((gradient != 0).any(-1)[:, int(family.has_cls) :].flatten())
    return torch.stack(rows)


def pooled(family: Family, **arguments: Any) -> Tensor:
    """(V, P) the share of each patch in each token's score, by the family's geometry."""
    geometry = family.geometry("image", arguments)  # type: ignore[attr-defined]
    tokens, patches = int(geometry.lens.sum()), support_width(family, arguments)
    shares = torch.autograd.functional.jacobian(geometry.pool, torch.rand(patches))
    assert isinstance(shares, Tensor)
    assert shares.shape[0] == tokens
    return shares


def support_width(family: Family, arguments: dict[str, Any]) -> int:
    """How many patches the encoder makes of a call, class tokens left out."""
    seen = []
    handle = family.blocks[family.feature_block].register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    try:
        with torch.no_grad():
            family.model.get_image_features(**arguments, return_dict=True)
    finally:
        handle.remove()
    return seen[0].shape[0] * (seen[0].shape[1] - int(family.has_cls))


def windows(values: Tensor, side: int, merge: int) -> Tensor:
    """Means of (n side side,) values over windows; what fills no window is cut off."""
    fit = side // merge * merge
    maps = values.view(-1, side, side)[:, :fit, :fit]
    cut = maps.reshape(-1, fit // merge, merge, fit // merge, merge)
    return cut.mean((2, 4)).flatten()
