"""Stage 1 of the tiny model: a CLIP vision tower that reads handwritten digits.

The tower is trained where LLaVA reads it, at hidden_states[-2]. Throw-away linear heads on the
patches name the digit and the colour of the ink they carry; heads on the class token name every
(digit, colour) pair of the scene, so the class token must look at the digits; a small term asks
its attention to lie on ink. The heads are dropped afterwards, the tower stays.

Shapes: B scenes, N = 144 patches, D width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from train.scenes.render import COLOURS, GRID, SIZE, Scenes, draw_scenes, sample_scenes

DIGITS, HUES, NOTHING = 10, len(COLOURS), -100
INK, FAINT = 0.15, 0.02


@dataclass
class TowerRecipe:
    """How the tower is built and trained."""

    width: int = 128
    layers: int = 5
    heads: int = 4
    steps: int = 3500
    batch: int = 48
    rate: float = 1.5e-3
    dense_share: float = 0.6
    """Share of the steps on crowded scenes (4-12 digits), which teach more per picture."""
    attention_weight: float = 0.1
    seed: int = 0


def tower_config(recipe: TowerRecipe) -> CLIPVisionConfig:
    """The tower's ordinary CLIP configuration."""
    return CLIPVisionConfig(
        hidden_size=recipe.width,
        intermediate_size=3 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        image_size=SIZE,
        patch_size=8,
        projection_dim=recipe.width,
    )


class Heads(nn.Module):
    """Throw-away linear readers of the patches and of the class token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.digit = nn.Linear(width, DIGITS + 1)
        self.hue = nn.Linear(width, HUES + 1)
        self.row = nn.Linear(width, GRID)
        self.column = nn.Linear(width, GRID)
        self.tag_norm = nn.LayerNorm(width)
        self.tags = nn.Linear(width, DIGITS * HUES + DIGITS + HUES)


@dataclass
class Targets:
    """What the heads should say; patch targets (B, N), class-token tags (B, 98)."""

    digit: Tensor
    hue: Tensor
    tags: Tensor
    ink: Tensor
    share: Tensor
    """(B, N) where the class token should look: all ink, in proportion to its square root."""


def targets(scenes: Scenes, ink: np.ndarray) -> Targets:
    """Read the targets off the scenes' ground truth."""
    count, side = len(scenes), ink.shape[1]
    digit_of = np.full((count, GRID * GRID), DIGITS)
    hue_of = np.full((count, GRID * GRID), HUES)
    row, slot = np.nonzero(scenes.cell >= 0)
    place = scenes.cell[row, slot]
    digit_of[row, place] = scenes.digit[row, slot]
    hue_of[row, place] = scenes.colour[row, slot]
    step = side // GRID
    spread = [
        of.reshape(count, GRID, GRID).repeat(step, 1).repeat(step, 2) for of in (digit_of, hue_of)
    ]
    digit = np.where(ink > INK, spread[0], np.where(ink < FAINT, DIGITS, NOTHING))
    hue = np.where(ink > INK, spread[1], np.where(ink < FAINT, HUES, NOTHING))
    tags = np.zeros((count, DIGITS * HUES + DIGITS + HUES), np.float32)
    digits, hues = scenes.digit[row, slot], scenes.colour[row, slot]
    tags[row, digits * HUES + hues] = 1
    tags[row, DIGITS * HUES + digits] = 1
    tags[row, DIGITS * HUES + DIGITS + hues] = 1
    share = np.sqrt(np.where(ink > FAINT, ink, 0)).reshape(count, -1)
    share = share / np.maximum(share.sum(1, keepdims=True), 1e-6)
    return Targets(
        digit=torch.from_numpy(digit.reshape(count, -1)),
        hue=torch.from_numpy(hue.reshape(count, -1)),
        tags=torch.from_numpy(tags),
        ink=torch.from_numpy((ink > INK).reshape(count, -1)),
        share=torch.from_numpy(share),
    )


def to_pixels(pictures: np.ndarray) -> Tensor:
    """(B, 96, 96, 3) uint8 to (B, 3, 96, 96) as the image processor gives it (mean, std 0.5)."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def class_attention(tower: CLIPVisionModel, entering: Tensor, index: int) -> Tensor:
    """(B, N) attention from the class token to the patches in block `index`, head mean."""
    block: Any = tower_blocks(tower)[index]
    normed = block.layer_norm1(entering)
    attention = block.self_attn
    batch, length, width = normed.shape
    heads = attention.num_heads
    query = attention.q_proj(normed[:, :1]).view(batch, 1, heads, -1).transpose(1, 2)
    key = attention.k_proj(normed).view(batch, length, heads, -1).transpose(1, 2)
    scores: Tensor = query.float() @ key.float().transpose(2, 3) / math.sqrt(width // heads)
    return scores.softmax(-1)[:, :, 0, 1:].mean(1)


def tower_blocks(tower: CLIPVisionModel) -> nn.ModuleList:
    """The transformer blocks of the tower."""
    blocks: nn.ModuleList = tower.encoder.layers
    return blocks


def tower_loss(
    tower: CLIPVisionModel, heads: Heads, pixels: Tensor, want: Targets, attention_weight: float
) -> tuple[Tensor, dict[str, float]]:
    """All losses of the tower on one batch, and the figures worth printing."""
    states = tower(pixels, output_hidden_states=True).hidden_states
    read = states[-2].float()
    patches = heads.norm(read[:, 1:])
    digit, hue = heads.digit(patches), heads.hue(patches)
    loss = F.cross_entropy(digit.transpose(1, 2), want.digit)
    loss = loss + F.cross_entropy(hue.transpose(1, 2), want.hue)
    cell = torch.arange(GRID).repeat_interleave(12 // GRID)
    row, column = (grid.reshape(-1) for grid in torch.meshgrid(cell, cell, indexing="ij"))
    for head, place in ((heads.row, row), (heads.column, column)):
        loss = loss + 0.1 * F.cross_entropy(
            head(patches).transpose(1, 2), place.expand(len(read), -1)
        )
    tags = torch.zeros(())
    for state in (states[-2], states[-1]):
        named = heads.tags(heads.tag_norm(state[:, 0].float()))
        tags = tags + F.binary_cross_entropy_with_logits(named, want.tags)
    attention = class_attention(tower, states[-3], -2)
    focus = -(want.share * attention.clamp(min=1e-6).log()).sum(1).mean()
    total = loss + 2 * tags + attention_weight * focus
    inked = want.digit < DIGITS
    inked &= want.digit >= 0
    figures = {
        "loss": float(total.detach()),
        "digit": float((digit.argmax(-1) == want.digit)[inked].float().mean()),
        "hue": float((hue.argmax(-1) == want.hue)[inked].float().mean()),
        "tags": float(tags.detach()),
        "onink": float((attention * want.ink).sum(1).mean().detach()),
    }
    return total, figures


@torch.no_grad()
def check_tower(tower: CLIPVisionModel, heads: Heads) -> str:
    """The figures on 256 validation scenes."""
    rng = np.random.default_rng(1)
    scenes = sample_scenes(rng, 256, "val")
    pictures, ink = draw_scenes(rng, scenes, "val")
    _, figures = tower_loss(tower, heads, to_pixels(pictures), targets(scenes, ink), 0.0)
    return "  ".join(f"{name} {value:.3f}" for name, value in figures.items())


def rate_at(step: int, steps: int, peak: float, warm: int = 100) -> float:
    """Warm-up, then a cosine to a twentieth of the peak."""
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm))))


def train_tower(
    recipe: TowerRecipe,
    say: Callable[[str], None],
    save: Callable[[CLIPVisionModel], None],
) -> CLIPVisionModel:
    """Train a tower from nothing; `save` is called now and then and at the end."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    tower, heads = (
        CLIPVisionModel._from_config(tower_config(recipe), attn_implementation="eager"),
        Heads(recipe.width),
    )
    weights = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=0.0, betas=(0.9, 0.98), weight_decay=0.05)
    began = time.time()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, recipe.steps, recipe.rate)
        crowded = step < recipe.dense_share * recipe.steps
        scenes = sample_scenes(rng, recipe.batch, "train", (4, 12) if crowded else (2, 6))
        pictures, ink = draw_scenes(rng, scenes, "train")
        want = targets(scenes, ink)
        with torch.autocast("cpu", torch.bfloat16):
            loss, figures = tower_loss(
                tower, heads, to_pixels(pictures), want, recipe.attention_weight
            )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 50 == 0:
            shown = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
            say(f"tower {step:5d}  {shown}  {time.time() - began:.0f} s")
        if step % 500 == 499:
            say(f"tower {step + 1:5d}  on other handwriting: {check_tower(tower, heads)}")
            save(tower)
    save(tower)
    return tower
