"""What the tests of the Qwen families share: tiny models and calls, and what is true of all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from itprune.families import find_family
from itprune.families.base import TokenFamily
from itprune.geometry import Geometry
from tests.family_models import build

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
MERGE, WIDTH = 2, 96
"""Patches on a token's side; numbers of a patch: 3 channels, 2 frames, 4 x 4 pixels."""
IMAGES = ((1, 8, 8), (1, 4, 12), (1, 6, 10))
VIDEOS = ((3, 4, 8), (2, 6, 6))
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def family_of(name: str) -> TokenFamily:
    found = find_family(build(name))
    assert isinstance(found, TokenFamily)
    return found


def call(kind: str, grids: tuple[tuple[int, int, int], ...], seed: int = 0) -> dict[str, Tensor]:
    """Arguments of `get_image_features` or `get_video_features` on random patches."""
    thw = torch.tensor(grids)
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(int(thw.prod(1).sum()), WIDTH, generator=generator)
    return {PIXELS[kind]: patches, f"{kind}_grid_thw": thw}


def encode(family: TokenFamily, kind: str, arguments: dict[str, Any]) -> Any:
    model = family.model.base_model
    encoders = {"image": model.get_image_features, "video": model.get_video_features}
    return encoders[kind](**arguments, return_dict=True)


def pool_matrix(geometry: Geometry) -> Tensor:
    """(V, P) weights of patches in tokens."""
    patches = len(geometry.source)
    return torch.stack([geometry.pool(row) for row in torch.eye(patches)], 1)


def support(family: TokenFamily, kind: str, arguments: dict[str, Any]) -> Tensor:
    """(V, P) which rows of the last block's output each token depends on."""
    leaf: list[Tensor] = []

    def cut(module: object, args: object, output: Tensor) -> Tensor:
        leaf.append(output.detach().requires_grad_())
        return leaf[0]

    handle = family.blocks[-1].register_forward_hook(cut)
    tokens = torch.cat(list(encode(family, kind, arguments).pooler_output))
    handle.remove()
    weight = torch.randn(tokens.shape[1], generator=torch.Generator().manual_seed(0))
    rows = [
        torch.autograd.grad(token @ weight, leaf[0], retain_graph=True)[0].abs().sum(1)
        for token in tokens
    ]
    return torch.stack(rows) > 1e-9
