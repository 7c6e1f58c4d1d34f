"""QueCC's compressor and SeTok's clustering against the published code."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor

from itprune.maths.density_peaks import Clusters, density_peaks
from itprune.maths.grids import block_order
from itprune.maths.querying import QuestionCompressor
from tests.golden import Golden, case

SIDE, KERNEL, HEADS = 24, 6, 8
NEIGHBOURS, THRESHOLD, FALLBACK = 16, 0.53, 16


@case("functional", "quecc.tokens")
def quecc(data: dict[str, Tensor], golden: Golden) -> Tensor:
    single, levels = data["quecc.single"][0], data["quecc.multi"][0]
    text = data["quecc.text"][0]
    module = QuestionCompressor(
        single.shape[1], levels.shape[1], text.shape[1], HEADS, KERNEL
    ).eval()
    module.load_state_dict(load_file(golden.folder / "quecc_weights.safetensors"), strict=True)
    order = block_order(torch.tensor([[SIDE, SIDE]]), KERNEL)
    blocks = (table[order].unflatten(0, (-1, KERNEL**2)) for table in (single, levels))
    image = torch.zeros((SIDE // KERNEL) ** 2, dtype=torch.long)
    return module(*blocks, text, image)[None]


def clusters(data: dict[str, Tensor]) -> Clusters:
    x = data["setok.x"][None]
    filled = torch.ones(x.shape[:2], dtype=torch.bool)
    return density_peaks(x, filled, NEIGHBOURS, THRESHOLD, FALLBACK)


@case("functional", "setok.score")
def setok_score(data: dict[str, Tensor], golden: Golden) -> Tensor:
    return clusters(data).score[0]


@case("functional", "setok.centers")
def setok_centres(data: dict[str, Tensor], golden: Golden) -> Tensor:
    return clusters(data).centre[0].nonzero()[:, 0]


@case("functional", "setok.assignment")
def setok_assignment(data: dict[str, Tensor], golden: Golden) -> Tensor:
    """The publication numbers clusters by their centres' order."""
    found = clusters(data)
    return found.centre[0].cumsum(0)[found.nearest[0]] - 1
