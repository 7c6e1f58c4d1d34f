"""Tiny random models of every family, and batches for them. No downloads, milliseconds a forward.

What a family's processor does is spelled out here in integers: how many placeholders an image has,
which markers stand around them, how pixels are laid out. Counts come from the model itself.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import transformers as hf
from torch import Tensor

from tests import family_configs as configs
from tests.family_configs import BEGIN, END, IMAGE, MARKS, PATCH, QWEN_VISION, SIDE, TEXT, VIDEO
from tests.models import ASSISTANT, DEPTH, PAD, collate, prompts

__all__ = ["ASSISTANT", "DEPTH", "NAMES", "VIDEO_FAMILIES", "batch", "build", "prompts"]


def build(name: str, **text: object) -> hf.PreTrainedModel:
    """A tiny model with attention that is not flat; the same weights every time."""
    return _make(name, text) if text else copy.deepcopy(_prototype(name))


@functools.cache
def _prototype(name: str) -> hf.PreTrainedModel:
    """Copied in half the time it takes to make."""
    return _make(name, {})


def _make(name: str, text: dict[str, object]) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    model = FAMILIES[name].build({**TEXT, **text})
    generator = torch.Generator().manual_seed(1)
    for weight_name, weight in model.named_parameters():
        if weight.ndim >= 2:
            width = 0.7 if "embed_tokens" in weight_name else weight[0].numel() ** -0.5
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * width)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()


# ---------------------------------------------------------------------------------- batches
# One row is a tuple of parts: an int is that many text tokens, "image" an image, "wide" one of
# another shape where the family knows shapes, "video" a clip of three frames, "frame" a clip of
# one, "answer" a supervised answer behind the assistant prefix.
ROWS: tuple[tuple[int | str, ...], ...] = (
    (5, "image", 9, "answer"),
    (3, "wide", 4, "answer", 3, "answer"),
    (2, "image", 3, "wide", 6, "answer"),
    (12, "answer"),
)
VIDEO_ROWS: tuple[tuple[int | str, ...], ...] = (
    (5, "video", 6, "answer"),
    (2, "image", 3, "video", 6, "answer"),
    (8, "answer"),
)


@dataclass
class Visuals:
    """What the rows of one batch show: pixels for the model, and tokens for each part."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    chunks: Iterator[Tensor] = field(default_factory=lambda: iter(()))
    """Placeholders with their markers, part after part."""


CLIPS = {"video": 3, "frame": 1}
"""Frames of a clip; the clips of one LLaVA-OneVision batch must agree."""
PICTURES = ("image", "wide")
Shown = list[list[str]]
"""The visual parts of each row."""
Draw = Callable[..., Tensor]
"""Random normal pixels of a shape, for the given row."""


def batch(
    name: str,
    model: hf.PreTrainedModel,
    rows: tuple[tuple[int | str, ...], ...] = ROWS,
    side: str = "right",
    seed: int = 0,
    order: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Collated inputs with labels; `order` picks rows, each the same whatever stands beside it."""
    order = range(len(rows)) if order is None else order
    generators = [torch.Generator().manual_seed(1000 * seed + row) for row in order]
    rows = tuple(rows[row] for row in order)
    shown = [[part for part in row if part in (*PICTURES, *CLIPS)] for row in rows]

    def draw(row: int, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generators[row])

    visuals = FAMILIES[name].show(model, shown, draw) if any(shown) else Visuals()
    ids, labels = [], []
    for row, generator in zip(rows, generators, strict=True):
        row_ids, row_labels = [torch.tensor([1])], [torch.tensor([-100])]
        for part in row:
            supervised = part == "answer"
            if supervised:
                row_ids.append(torch.tensor(ASSISTANT))
                row_labels.append(torch.full((2,), -100))
                tokens = torch.randint(3, 250, (3,), generator=generator)
            elif isinstance(part, int):
                tokens = torch.randint(3, 250, (part,), generator=generator)
            else:
                tokens = next(visuals.chunks)
            row_ids.append(tokens)
            row_labels.append(tokens if supervised else torch.full_like(tokens, -100))
        ids.append(torch.cat(row_ids))
        labels.append(torch.cat(row_labels))
    data = collate(ids, labels, side)
    return {**data, **visuals.inputs, **FAMILIES[name].types(data)}


def without_images(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tokens without what they show, for a later turn on a cache."""
    own = {"input_ids", "attention_mask", "labels", "mm_token_type_ids", "token_type_ids"}
    return {key: value for key, value in data.items() if key in own}


def placeholders(data: dict[str, Tensor]) -> Tensor:
    """(B, S) bool: visual tokens."""
    return (data["input_ids"] == IMAGE) | (data["input_ids"] == VIDEO)


def _lengths(features: object) -> list[int]:
    return [len(image) for image in features.pooler_output]


def _run(count: int, token: int = IMAGE) -> Tensor:
    return torch.cat([torch.tensor([BEGIN]), torch.full((count,), token), torch.tensor([END])])


def _squares(model: hf.PreTrainedModel, shown: Shown, draw: Draw) -> Visuals:
    """One square picture an image."""
    pixels = [draw(row, 3, SIDE, SIDE) for row, parts in enumerate(shown) for _ in parts]
    inputs = {"pixel_values": torch.stack(pixels)}
    with torch.no_grad():
        lengths = _lengths(model.get_image_features(**inputs, return_dict=True))
    return Visuals(inputs, map(_run, lengths))


def _crops(model: hf.PreTrainedModel, shown: Shown, draw: Draw) -> Visuals:
    """InternVL: a wide image is two tiles and a thumbnail, their tokens one run."""
    tiles = [(row, 3 if part == "wide" else 1) for row, parts in enumerate(shown) for part in parts]
    inputs = {"pixel_values": torch.cat([draw(row, n, 3, SIDE, SIDE) for row, n in tiles])}
    with torch.no_grad():
        lengths = _lengths(model.get_image_features(**inputs, return_dict=True))
    return Visuals(inputs, (_run(lengths[0] * n) for _, n in tiles))


def _marked_tiles(model: hf.PreTrainedModel, shown: Shown, draw: Draw) -> Visuals:
    """Idefics 3: tiles of a row in one stack padded with black ones; a marker before each tile."""
    tiles = [[3 if part == "wide" else 1 for part in parts] for parts in shown]
    most = max(map(sum, tiles))
    pixels = torch.zeros(len(shown), most, 3, SIDE, SIDE)
    for row, counts in enumerate(tiles):
        if counts:
            pixels[row, : sum(counts)] = draw(row, sum(counts), 3, SIDE, SIDE)
    inputs = {"pixel_values": pixels}
    with torch.no_grad():
        lengths = _lengths(model.get_image_features(**inputs, return_dict=True))
    length = sum(lengths) // sum(map(sum, tiles))
    marked = [
        torch.cat([torch.cat([torch.tensor([MARKS + n]), _run(length)]) for n in range(count)])
        for counts in tiles
        for count in counts
    ]
    return Visuals(inputs, iter(marked))


def _any_resolution(model: hf.PreTrainedModel, shown: Shown, draw: Draw) -> Visuals:
    """LLaVA-NeXT: a thumbnail and tiles; images of one batch padded to the same count of tiles."""
    sizes = [[(24, 48) if part == "image" else (48, 16) for part in parts] for parts in shown]
    pixels = [draw(row, 3, 3, SIDE, SIDE) for row, parts in enumerate(shown) for _ in parts]
    inputs = {
        "pixel_values": torch.stack(pixels),
        "image_sizes": torch.tensor([size for row in sizes for size in row]),
    }
    with torch.no_grad():
        lengths = _lengths(model.get_image_features(**inputs, return_dict=True))
    return Visuals(inputs, map(_run, lengths))


def _one_vision(model: hf.PreTrainedModel, shown: Shown, draw: Draw) -> Visuals:
    """LLaVA-OneVision: one image of a row in tiles, several whole; clips of pooled frames."""
    inputs, found = {}, {}
    images = [[part for part in parts if part in PICTURES] for parts in shown]
    if any(images):
        most, sizes, pixels = 5, [], []
        for row, parts in enumerate(images):
            for part in parts:
                sizes.append((24, 48) if part == "image" else (48, 40))
                count = 1 if len(parts) > 1 else 3 if part == "image" else 5
                stack = torch.zeros(most, 3, SIDE, SIDE)
                stack[:count] = draw(row, count, 3, SIDE, SIDE)
                pixels.append(stack)
        inputs = {
            "pixel_values": torch.stack(pixels),
            "image_sizes": torch.tensor(sizes),
            "batch_num_images": torch.tensor([len(parts) for parts in images]),
        }
        with torch.no_grad():
            found = {"image": _lengths(model.get_image_features(**inputs, return_dict=True))}
    clips = [
        (row, CLIPS[part]) for row, parts in enumerate(shown) for part in parts if part in CLIPS
    ]
    if clips:
        inputs["pixel_values_videos"] = torch.stack(
            [draw(row, frames, 3, SIDE, SIDE) for row, frames in clips]
        )
        with torch.no_grad():
            pooled = model.model.apply_pooling(torch.zeros(1, (SIDE // PATCH) ** 2, 1)).shape[1]
        found["video"] = [frames * pooled + 1 for _, frames in clips]  # and a newline
    return Visuals(inputs, _in_order(shown, found))


def _dynamic(model: hf.PreTrainedModel, shown: Shown, draw: Draw) -> Visuals:
    """Qwen: images of any shape as rows of patches, and clips whose frames come in pairs."""
    shapes = {"image": (1, 8, 8), "wide": (1, 4, 12)}
    shapes |= {part: (frames, 4, 8) for part, frames in CLIPS.items()}
    inputs: dict[str, Tensor] = {}
    found: dict[str, list[int]] = {}
    width = 3 * QWEN_VISION["temporal_patch_size"] * PATCH**2
    for kind, suffix in (("image", ""), ("video", "_videos")):
        parts = [
            (row, part)
            for row, row_parts in enumerate(shown)
            for part in row_parts
            if (part in CLIPS) == (kind == "video")
        ]
        if not parts:
            continue
        grids = torch.tensor([shapes[part] for _, part in parts])
        patches = [draw(row, int(grids[i].prod()), width) for i, (row, _) in enumerate(parts)]
        own = {f"pixel_values{suffix}": torch.cat(patches), f"{kind}_grid_thw": grids}
        encode = model.get_video_features if kind == "video" else model.get_image_features
        with torch.no_grad():
            found[kind] = _lengths(encode(**own, return_dict=True))
        inputs |= own
    stamped = model.config.model_type == "qwen3_vl"
    return Visuals(inputs, _in_order(shown, found, stamped))


def _in_order(shown: Shown, found: dict[str, list[int]], stamped: bool = False) -> Iterator[Tensor]:
    """Runs of placeholders; where clips are stamped, each frame a run behind its time stamp."""
    left = {kind: iter(lengths) for kind, lengths in found.items()}
    for part in (part for parts in shown for part in parts):
        if part in PICTURES:
            yield _run(next(left["image"]))
            continue
        count, frames = next(left["video"]), CLIPS[part] if stamped else 1
        stamps = [torch.tensor([MARKS + frame] if stamped else []) for frame in range(frames)]
        yield torch.cat([t for s in stamps for t in (s.long(), _run(count // frames, VIDEO))])


def _no_types(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {}


def _modality_types(data: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = data["input_ids"]
    return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


def _image_types(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"token_type_ids": (data["input_ids"] == IMAGE).long()}


def _suffix_types(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """PaliGemma: everything before the first answer is read in both directions."""
    supervised = data["labels"] != -100
    return {"token_type_ids": (supervised.long().cumsum(1) > 0).long()}


@dataclass(frozen=True)
class Tiny:
    """How to build one family and its batches."""

    build: Callable[[dict], hf.PreTrainedModel]
    show: Callable[[hf.PreTrainedModel, Shown, Draw], Visuals]
    types: Callable[[dict[str, Tensor]], dict[str, Tensor]] = _no_types
    video: bool = False


FAMILIES = {
    "llava": Tiny(configs.llava, _squares),
    "llava_next": Tiny(configs.llava_next, _any_resolution),
    "llava_onevision": Tiny(configs.llava_onevision, _one_vision, video=True),
    "qwen2_vl": Tiny(configs.qwen2_vl, _dynamic, _modality_types, video=True),
    "qwen2_5_vl": Tiny(configs.qwen2_5_vl, _dynamic, _modality_types, video=True),
    "qwen3_vl": Tiny(configs.qwen3_vl, _dynamic, _modality_types, video=True),
    "internvl": Tiny(configs.internvl, _crops),
    "idefics3": Tiny(configs.idefics3, _marked_tiles),
    "smolvlm": Tiny(configs.smolvlm, _marked_tiles),
    "gemma3": Tiny(configs.gemma3, _squares, _image_types),
    "paligemma": Tiny(configs.paligemma, _squares, _suffix_types),
    "paligemma_2": Tiny(configs.paligemma_2, _squares, _suffix_types),
}
NAMES = tuple(FAMILIES)
VIDEO_FAMILIES = tuple(name for name, tiny in FAMILIES.items() if tiny.video)
