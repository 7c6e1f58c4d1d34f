"""Qwen2-VL and its successors: what is true of all three."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

from itprune import PruneConfig, attach
from itprune.families.base import TokenFamily
from itprune.families.flat_patches import FlatPatches
from tests.families.qwen import (
    IMAGES,
    MERGE,
    NAMES,
    PIXELS,
    VIDEOS,
    WIDTH,
    call,
    encode,
    family_of,
    pool_matrix,
    support,
)

LAYOUT = FlatPatches(channels=3, frames=2, side=4, merge=2)


@pytest.fixture(scope="module", params=NAMES)
def family(request: pytest.FixtureRequest) -> TokenFamily:
    return family_of(request.param)


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def name_of_shrinking(request: pytest.FixtureRequest) -> str:
    """Qwen3-VL keeps its pictures' size."""
    return request.param


@pytest.fixture(scope="module")
def shrinking(name_of_shrinking: str) -> TokenFamily:
    return family_of(name_of_shrinking)


# ------------------------------------------------------------------------------- the model
def test_the_shape_of_the_host(family: TokenFamily) -> None:
    host = family.host
    assert (host.depth, host.width, host.heads) == (6, 32, 4)
    assert (host.vision_blocks, host.vision_width, host.vision_heads) == (3, 32, 4)
    assert host.grid == (56, 56)  # 448 pixels in tokens of 8 x 8
    assert not host.has_cls
    assert family.position_axes == 3
    assert family.placeholders == {"image": 290, "video": 291}
    assert family.layers is family.model.model.language_model.layers


def test_features_are_made_by_the_last_block() -> None:
    assert family_of("qwen2_vl").feature_block == 2
    assert family_of("qwen3_vl").feature_block == 2


def test_projectors_are_all_between_the_blocks_and_the_tokens(family: TokenFamily) -> None:
    named = {id(p) for module in family.projectors for p in module.parameters()}
    tower = {name: p for name, p in family.tower.named_parameters() if id(p) not in named}
    assert {name.split(".")[0] for name in tower} <= {"patch_embed", "pos_embed", "blocks"}


def test_a_blank_image_is_four_tokens(family: TokenFamily) -> None:
    blank = family.blank_image()
    with torch.no_grad():
        features = encode(family, "image", blank).pooler_output
    assert [tuple(image.shape) for image in features] == [(4, 32)]
    assert family.geometry("image", blank).grid.tolist() == [[2, 2]]


def test_counts_do_not_tell_grids(family: TokenFamily) -> None:
    with pytest.raises(ValueError, match="differ in size"):
        family.slot_grids(32)


# ------------------------------------------------------------------------------- tokens
def test_an_image_is_a_grid(family: TokenFamily) -> None:
    arguments = call("image", IMAGES)
    geometry = family.geometry("image", arguments)
    assert geometry.grid.tolist() == [[4, 4], [2, 6], [3, 5]]
    assert geometry.source.bincount().tolist() == [64, 48, 60]
    assert geometry.slot is None
    assert geometry.separator is None
    assert geometry.clip is None
    with torch.no_grad():
        features = encode(family, "image", arguments).pooler_output
    assert geometry.lens.tolist() == [len(image) for image in features]


def test_a_frame_is_a_grid_and_a_video_is_a_clip(family: TokenFamily) -> None:
    arguments = call("video", VIDEOS)
    geometry = family.geometry("video", arguments)
    assert geometry.grid.tolist() == [[2, 4]] * 3 + [[3, 3]] * 2
    assert geometry.source.bincount().tolist() == [32] * 3 + [36] * 2
    assert geometry.clip is not None
    assert geometry.clip.tolist() == [0, 0, 0, 1, 1]
    assert geometry.by_clip().grid.tolist() == [[6, 4], [6, 3]]
    with torch.no_grad():
        features = encode(family, "video", arguments).pooler_output
    assert geometry.by_clip().lens.tolist() == [len(video) for video in features]


@pytest.mark.parametrize(("kind", "grids"), [("image", IMAGES), ("video", VIDEOS)])
def test_scores_are_pooled_where_features_are(family: TokenFamily, kind: str, grids: Any) -> None:
    arguments = call(kind, grids)
    weights = pool_matrix(family.geometry(kind, arguments))
    assert torch.equal(weights > 0, support(family, kind, arguments))
    assert set(weights.unique().tolist()) == {0, 1 / MERGE**2}


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_scores_stand_in_merge_order(name: str) -> None:
    """Score maps in raster order, laid out as the processors do, pool to blocks of the map."""
    maps = [torch.randn(h, w) for _, h, w in IMAGES]
    flat = [
        image[row + i, column + j]
        for image in maps
        for row in range(0, image.shape[0], MERGE)
        for column in range(0, image.shape[1], MERGE)
        for i in range(MERGE)
        for j in range(MERGE)
    ]
    geometry = family_of(name).geometry("image", call("image", IMAGES))
    expected = [F.avg_pool2d(image[None], MERGE).flatten() for image in maps]
    torch.testing.assert_close(geometry.pool(torch.stack(flat)), torch.cat(expected))


# ------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"image_grid_thw": None}, "image_grid_thw is missing"),
        ({"image_grid_thw": torch.tensor([[1, 7, 8]])}, "multiples of 2"),
        ({"image_grid_thw": torch.tensor([[1, 0, 8]])}, "must be positive"),
        ({"image_grid_thw": torch.tensor([[0, 8, 8]])}, "must be positive"),
        ({"image_grid_thw": torch.tensor([[1, 8, 6]])}, "has 64 patches, but image_grid_thw"),
    ],
)
def test_bad_grids_are_named(family: TokenFamily, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        family.geometry("image", {**call("image", ((1, 8, 8),)), **change})


# ------------------------------------------------------------------------------- smaller pictures
def test_patches_are_laid_out_as_the_processor_does() -> None:
    pixels = np.random.RandomState(0).randint(0, 255, (24, 40, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
        do_resize=False,
        do_rescale=False,
        do_normalize=False,
    )
    made = processor(images=Image.fromarray(pixels), return_tensors="pt")
    patches, thw = made["pixel_values"].float(), tuple(made["image_grid_thw"][0].tolist())
    pictures = LAYOUT.pictures(patches, thw)
    expected = torch.tensor(pixels).permute(2, 0, 1).float()
    assert torch.equal(pictures, expected.expand(2, -1, -1, -1))
    assert torch.equal(LAYOUT.patches(pictures), patches)


def test_pictures_and_patches_are_each_others_inverse() -> None:
    patches = torch.randn(3 * 6 * 10, WIDTH)
    pictures = LAYOUT.pictures(patches, (3, 6, 10))
    assert pictures.shape == (6, 3, 24, 40)
    assert torch.equal(LAYOUT.patches(pictures), patches)


@pytest.mark.parametrize(("kind", "grids"), [("image", IMAGES), ("video", VIDEOS)])
def test_the_same_size_changes_nothing(shrinking: TokenFamily, kind: str, grids: Any) -> None:
    arguments = call(kind, grids)
    same = [tuple(grid) for grid in shrinking.geometry(kind, arguments).grid.tolist()]
    again = shrinking.shrink(kind, arguments, same)
    assert again is not None
    assert again.keys() == arguments.keys()
    assert all(torch.equal(again[key], arguments[key]) for key in arguments)


def test_each_picture_is_shrunk_on_its_own(shrinking: TokenFamily) -> None:
    arguments = call("image", IMAGES)
    before = {key: value.clone() for key, value in arguments.items()}
    smaller = shrinking.shrink("image", arguments, [(2, 3), (1, 4), (3, 5)])
    assert smaller is not None
    assert smaller["image_grid_thw"].tolist() == [[1, 4, 6], [1, 2, 8], [1, 6, 10]]
    first = LAYOUT.pictures(smaller["pixel_values"][:24], (1, 4, 6))
    whole = LAYOUT.pictures(arguments["pixel_values"][:64], (1, 8, 8))
    expected = F.interpolate(whole, (16, 24), mode="bicubic", antialias=True)
    torch.testing.assert_close(first, expected)
    assert torch.equal(smaller["pixel_values"][-60:], arguments["pixel_values"][-60:])
    assert all(torch.equal(arguments[key], before[key]) for key in before)
    with torch.no_grad():
        features = encode(shrinking, "image", smaller).pooler_output
    assert shrinking.geometry("image", smaller).lens.tolist() == [len(image) for image in features]


def test_frames_of_a_video_shrink_alike(shrinking: TokenFamily) -> None:
    arguments = call("video", VIDEOS)
    smaller = shrinking.shrink("video", arguments, [(1, 2)] * 3 + [(2, 2)] * 2)
    assert smaller is not None
    assert smaller["video_grid_thw"].tolist() == [[3, 2, 4], [2, 4, 4]]
    whole = LAYOUT.pictures(arguments["pixel_values_videos"][96:], (2, 6, 6))
    shown = LAYOUT.pictures(smaller["pixel_values_videos"][24:], (2, 4, 4))
    for frame, picture in zip(shown, whole, strict=True):  # no frame takes part in another
        expected = F.interpolate(picture[None], (16, 16), mode="bicubic", antialias=True)[0]
        torch.testing.assert_close(frame, expected)
    with torch.no_grad():
        features = encode(shrinking, "video", smaller).pooler_output
    assert [len(video) for video in features] == [6, 8]


def test_sizes_worked_out_beforehand_are_left_out(shrinking: TokenFamily) -> None:
    arguments: dict[str, Any] = call("image", ((1, 8, 8),))
    given = {**arguments, "image_cu_seqlens": torch.tensor([0, 64]), "return_dict": True}
    smaller = shrinking.shrink("image", given, [(2, 2)])
    assert smaller is not None
    assert smaller.keys() == {"pixel_values", "image_grid_thw", "return_dict"}


def test_narrow_numbers_stay_narrow(shrinking: TokenFamily) -> None:
    arguments: dict[str, Tensor] = call("image", ((1, 8, 8),))
    arguments["pixel_values"] = arguments["pixel_values"].bfloat16()
    smaller = shrinking.shrink("image", arguments, [(2, 2)])
    assert smaller is not None
    assert smaller[PIXELS["image"]].dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "grids"), [("image", IMAGES), ("video", VIDEOS)])
def test_a_small_picture_fills_the_middles(name_of_shrinking: str, kind: str, grids: Any) -> None:
    """Through the engine: the slots that are not zero hold what the bare encoder makes of the
    shrunk pictures, token (i, j) in the middle of the tokens it stands for."""
    family = family_of(name_of_shrinking)
    arguments, keep = call(kind, grids), 0.3
    whole = [tuple(grid) for grid in family.geometry(kind, arguments).grid.tolist()]
    wanted = [tuple(max(round(side * keep**0.5), 1) for side in grid) for grid in whole]
    smaller = family.shrink(kind, arguments, wanted)
    assert smaller is not None
    slots, start = [], 0
    for (rows, columns), (r, c) in zip(whole, wanted, strict=True):
        for i, j in ((i, j) for i in range(r) for j in range(c)):
            row, column = (2 * i + 1) * rows // (2 * r), (2 * j + 1) * columns // (2 * c)
            slots.append(start + row * columns + column)
        start += rows * columns
    with torch.no_grad():
        expected = torch.cat(list(encode(family, kind, smaller).pooler_output))
        lens = [len(part) for part in encode(family, kind, arguments).pooler_output]
        with attach(family.model, PruneConfig("downsample", keep=keep)):
            found = encode(family, kind, arguments).pooler_output
    assert [len(part) for part in found] == lens
    filled = torch.zeros(start, expected.shape[1]).index_copy(0, torch.tensor(slots), expected)
    assert torch.equal(torch.cat(list(found)), filled)
