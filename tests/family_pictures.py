"""The two pictures of docs/models.md: `python -m tests.family_pictures docs`.

models_geometry.png: which patches make which token, and in which order both sides have them. It is
drawn from the geometry of tiny models with random weights: nothing in it depends on weights.
models_scores.png: what the bundled, trained encoder scores on drawn scenes, by its class token and
by attention received, which takes its place in encoders without one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from itprune import PruneConfig, attach
from itprune.families import find_family
from itprune.geometry import Geometry
from itprune.inputs import load_processor
from itprune.methods import register_method
from itprune.methods.base import Method
from itprune.scores import attention_received, cls_attention
from itprune.tokens import Images, Kept, keep_all
from tests.family_models import build
from train.scenes.render import PATCH, draw_scenes, sample_scenes

ROOT = Path(__file__).parent.parent
SEPARATOR, EDGE, NONE = "#D55E00", "#ffffff", "#f4f4f4"
"""Vermilion beside the yellows and blues of cividis: apart for colour-blind readers, too."""
MAP = "cividis"


# ---------------------------------------------------------------------------------- geometry
def owners(geometry: Geometry, patches: int) -> Tensor:
    """(P,) the token each of the encoder's patches is pooled into; -1: none."""
    weight = torch.stack([geometry.pool(patch) for patch in torch.eye(patches)], 1)
    return torch.where(weight.sum(0) > 0, weight.argmax(0), -1)


class Panel:
    """A grid of cells on its own axes: colour by the token's order, and a number in each."""

    def __init__(self, axis: Any, title: str, tokens: int) -> None:
        self.axis, self.tokens = axis, tokens
        axis.set_title(title, fontsize=8.5, loc="left")
        axis.set_aspect("equal")
        axis.set_axis_off()
        self.low, self.high = np.array([np.inf, np.inf]), np.array([-np.inf, -np.inf])

    def cell(self, row: float, column: float, text: object, token: int | None) -> None:
        """One cell; token -1 is part of no token, None a separator."""
        share = 0.0 if token is None else max(token, 0) / max(self.tokens - 1, 1)
        colour: Any = colormaps[MAP](share)
        if token is None or token < 0:
            colour = SEPARATOR if token is None else NONE
        ink = "#000000" if token is not None and (token < 0 or share > 0.55) else "#ffffff"
        unused = token is not None and token < 0  # hatched: the middle of the map is grey, too
        edge, hatch = ("#b0b0b0", "////") if unused else (EDGE, None)
        patch = Rectangle((column, row), 1, 1, fc=colour, ec=edge, lw=0.8, hatch=hatch)
        self.axis.add_patch(patch)
        size = 6.5 if self.wide() else 7.5
        self.axis.text(
            column + 0.5, row + 0.53, str(text), ha="center", va="center", fontsize=size, color=ink
        )
        corner = np.array([column, row])
        self.low, self.high = np.minimum(self.low, corner), np.maximum(self.high, corner + 1)

    def wide(self) -> bool:
        return self.tokens > 40

    def outline(self, row: float, column: float, height: float, width: float) -> None:
        box = Rectangle((column, row), width, height, fill=False, ec="#000000", lw=1.6)
        self.axis.add_patch(box)

    def close(self) -> None:
        self.axis.set_xlim(self.low[0] - 0.3, self.high[0] + 0.3)
        self.axis.set_ylim(self.high[1] + 0.3, self.low[1] - 0.3)


def token_panel(axis: Any, geometry: Geometry, title: str) -> None:
    """What the language model sees: slots at their places, separators behind their rows."""
    slots, start, top = geometry.slots().tolist(), 0, 0.0
    panel = Panel(axis, title, len(slots))
    for rows, columns in geometry.grid.tolist():
        for index in range(rows * columns):
            token = start + index
            panel.cell(top + index // columns, index % columns, slots[token], token)
            if geometry.separator is not None and index % columns == columns - 1:
                separator = int(geometry.separator[token])
                if separator >= 0:
                    panel.cell(top + index // columns, columns, separator, None)
        start, top = start + rows * columns, top + rows + 0.6
    panel.close()


def square_panel(axis: Any, geometry: Geometry, side: int, title: str) -> None:
    """One square tile whose patches come row by row."""
    own = owners(geometry, side * side)
    panel = Panel(axis, title, int(geometry.lens.sum()))
    for patch, token in enumerate(own.tolist()):
        panel.cell(patch // side, patch % side, patch, token)
    panel.close()


def windowed_panel(axis: Any, geometry: Geometry, window: int, title: str) -> None:
    """Patches at their places with the encoder's own numbers; windows of merged tokens outlined."""
    rows, columns = geometry.grid[0].tolist()
    own = owners(geometry, 4 * rows * columns)
    panel = Panel(axis, title, rows * columns)
    for token in range(rows * columns):
        top, left = 2 * (token // columns), 2 * (token % columns)
        for inner, patch in enumerate((own == token).nonzero()[:, 0].tolist()):
            panel.cell(top + inner // 2, left + inner % 2, patch, token)
    for top in range(0, 2 * rows, 2 * window):
        for left in range(0, 2 * columns, 2 * window):
            panel.outline(top, left, 2 * window, 2 * window)
    panel.close()


def tiles_panel(axis: Any, geometry: Geometry, tiles: int, side: int, title: str) -> None:
    """The overview above the tiles of the mosaic, as the encoder gets them."""
    own = owners(geometry, tiles * side * side).view(tiles, side, side)
    panel = Panel(axis, title, int(geometry.lens.sum()))
    for tile in range(tiles):
        top = 0.0 if tile == 0 else side + 0.6
        left = 0.0 if tile == 0 else (tile - 1) * (side + 0.3)
        for place in range(side * side):
            row, column = divmod(place, side)
            number = tile * side * side + place
            panel.cell(top + row, left + column, number, int(own[tile, row, column]))
    panel.close()


def draw_geometry(out: Path) -> None:
    """One column a way of making tokens; encoder above, language model below."""
    figure = Figure(figsize=(13, 8.4), layout="constrained")
    upper, lower = figure.subplots(2, 3, width_ratios=[0.9, 1.15, 1.25], height_ratios=[1, 1])

    family = find_family(build("internvl"))
    geometry = family.geometry("image", {"pixel_values": torch.zeros(1, 3, 24, 24)})
    square_panel(upper[0], geometry, 6, "InternVL: 6 x 6 patches of a tile, in the encoder's order")
    token_panel(lower[0], geometry, "pixel shuffle: 2 x 2 patches make a token")

    family = find_family(build("qwen2_5_vl"))
    thw = torch.tensor([[1, 8, 8]])
    pixels = torch.zeros(64, family.layout.width)
    geometry = family.geometry("image", {"pixel_values": pixels, "image_grid_thw": thw})
    title = "Qwen2.5-VL: 8 x 8 patches, numbered window by window"
    windowed_panel(upper[1], geometry, 2, title)
    token_panel(lower[1], geometry, "merger: 2 x 2 patches make a token, back in raster order")

    family = find_family(build("llava_next"))
    pixels, sizes = torch.zeros(1, 3, 3, 24, 24), torch.tensor([[16, 48]])
    geometry = family.geometry("image", {"pixel_values": pixels, "image_sizes": sizes})
    title = "LLaVA-NeXT: overview, and two tiles with margins (hatched)"
    tiles_panel(upper[2], geometry, 3, 6, title)
    title = "overview, and one mosaic without margins; a newline behind each row"
    token_panel(lower[2], geometry, title)
    figure.savefig(out, dpi=110)


# ---------------------------------------------------------------------------------- scores
@register_method("picture_probe")
class PictureProbe(Method):
    """Drops nothing; keeps both scores of the feature block."""

    places = ("before_llm",)

    def before_llm(self, images: Images) -> Kept:
        block = images.block(images.feature_block)
        self.cls = cls_attention(block.query, block.key, block.scale)
        # As in an encoder that has no class token: patches look at patches.
        query, key = (t[:, :, 1:] for t in (block.query, block.key))
        self.received = attention_received(query, key, block.scale)
        return keep_all(images)


def scene_scores(count: int, seed: int) -> tuple[np.ndarray, Tensor, Tensor]:
    """Pictures, and (n, P) both scores of the bundled model."""
    rng = np.random.default_rng(seed)
    pictures, _ = draw_scenes(rng, sample_scenes(rng, count, "val"), "val")
    model = LlavaForConditionalGeneration.from_pretrained(
        ROOT / "assets" / "tiny-llava", dtype=torch.float32
    ).eval()
    assert isinstance(model.model.vision_tower, CLIPVisionModel)
    processor = load_processor(ROOT / "assets" / "tiny-llava")
    images = [Image.fromarray(picture) for picture in pictures]
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    place = torch.full((count, (96 // PATCH) ** 2), model.config.image_token_id)
    ids = torch.cat([torch.ones(count, 1, dtype=torch.long), place, torch.full((count, 2), 9)], 1)
    with attach(model, PruneConfig("picture_probe", keep=0.5)) as pruner, torch.no_grad():
        model(input_ids=ids, pixel_values=pixels)
        return np.asarray(pictures), pruner.method.cls, pruner.method.received


def draw_scores(out: Path, count: int = 4, seed: int = 3, keep: float = 0.22) -> None:
    """Scene, score by class token, score by attention received; what each would keep outlined."""
    pictures, by_cls, received = scene_scores(count, seed)
    figure = Figure(figsize=(2.2 * count + 0.8, 7), layout="constrained")
    axes = figure.subplots(3, count)
    side = round(by_cls.shape[1] ** 0.5)
    for column in range(count):
        axes[0, column].imshow(pictures[column])
        for row, score in ((1, by_cls[column]), (2, received[column])):
            axis, best = axes[row, column], torch.zeros(side * side)
            best[score.topk(round(keep * len(score))).indices] = 1
            axis.imshow(score.view(side, side).numpy(), cmap=MAP)
            for place in best.nonzero()[:, 0].tolist():
                top, left = divmod(place, side)
                axis.plot(left, top, ".", color=SEPARATOR, markersize=4)
        both = set(by_cls[column].topk(round(keep * side**2)).indices.tolist())
        both &= set(received[column].topk(round(keep * side**2)).indices.tolist())
        axes[2, column].set_xlabel(f"{len(both)} of {round(keep * side**2)} the same", fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for axis, name in zip(
        axes[:, 0], ("scene", "attention of CLS", "attention received"), strict=True
    ):
        axis.set_ylabel(name, fontsize=9)
    figure.savefig(out, dpi=100)


def main(folder: Path) -> None:
    draw_geometry(folder / "models_geometry.png")
    draw_scores(folder / "models_scores.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
