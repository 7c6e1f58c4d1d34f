"""`Images` made by hand, without any model, for the methods that are trained."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from itprune.methods import build_method
from itprune.methods.base import Host, Method
from itprune.tokens import Block, Images, Kept

WIDTH, TEXT = 32, 48
HOST = replace(
    Host.example(),
    width=TEXT,
    vision_width=WIDTH,
    vision_heads=4,
    vision_blocks=6,
    feature_block=4,
    grid=(12, 12),
)
NAMES = ("quecc", "setok", "vistog")


def seeded(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image(rows: int, columns: int, seed: int) -> dict[str, Tensor]:
    """One image's raw material: clumps in colour, so that clustering has something to find."""
    length = rows * columns
    colours = 3 * seeded(5, WIDTH, seed=seed)
    pick = torch.randint(5, (length,), generator=torch.Generator().manual_seed(seed))
    features = colours[pick] + 0.3 * seeded(length, WIDTH, seed=seed + 1)
    return {
        "features": features,
        "hidden": seeded(8, length + 1, WIDTH, seed=seed + 2),
        "question": seeded(TEXT, seed=seed + 3),
        "grid": torch.tensor([rows, columns]),
    }


def images_of(*parts: dict[str, Tensor], extra: Tensor | None = None) -> Images:
    """What a method is handed; the encoder's blocks are a table only where the grids agree."""
    grid = torch.stack([part["grid"] for part in parts])
    lens = grid.prod(1)

    def block(index: int) -> Block:
        hidden = torch.stack([part["hidden"][index] for part in parts])
        none = hidden.new_zeros(len(parts), 1, hidden.shape[1], 1)
        return Block(none, none, 1.0, hidden)

    def unused() -> tuple[Tensor, Tensor]:
        raise AssertionError("nobody asks for this")

    return Images(
        features=torch.cat([part["features"] for part in parts]),
        lens=lens,
        pixels=torch.zeros(len(parts), 1),
        slots=lens,
        grid=grid,
        slot_grid=grid,
        sample=torch.arange(len(parts)),
        feature_block=HOST.feature_block,
        has_cls=True,
        block=block,
        projected=unused,
        question=lambda: torch.stack([part["question"] for part in parts]),
        instruction=unused,
        extra=extra,
    )


def built(name: str, keep: float | None = None, host: Host = HOST, **options: object) -> Method:
    torch.manual_seed(0)
    method = build_method(name, options, host)
    method.share(keep)
    return method.eval()


def shaken(module: nn.Module, seed: int = 9) -> nn.Module:
    """Weights away from their start, so that no branch is silent."""
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return module


def with_extra(method: Method, *parts: dict[str, Tensor]) -> Images:
    """The semantic tokens after an encoder that looks at them and the image."""
    tokens = method.tower_tokens()
    if tokens is None:
        return images_of(*parts)
    seen = [5 * tokens + part["features"].mean(0) for part in parts]
    return images_of(*parts, extra=torch.stack(seen))


def contents(kept: Kept) -> Tensor:
    assert kept.features is not None
    return kept.features[kept.keep]
