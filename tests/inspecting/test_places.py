"""Every grid of every family lies where its tokens are, on the picture the encoder saw."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from itprune import Loaded, load_pretrained
from itprune.answer import Answerer
from itprune.families import find_family
from itprune.inspecting.looking import Label, Looker
from itprune.inspecting.places import find_places
from itprune.question import Question
from tests.family_models import build
from tests.inspecting.conftest import MODEL
from tests.tiny_folders import MAKERS, build_folder


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3))
    small = Image.fromarray(pixels.astype(np.uint8))
    return small.resize((width, height), Image.Resampling.NEAREST)


@pytest.fixture(scope="module", params=[*MAKERS])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_folder(request.param, tmp_path_factory.mktemp(request.param))


def load(folder: Path) -> Loaded:
    loaded = load_pretrained(folder, method="itprune", device="cpu")
    assert loaded.attached is not None
    loaded.attached.set_keep(None)
    return loaded


@pytest.mark.parametrize("sizes", [[(160, 96)], [(64, 64), (96, 160)]])
def test_grids_hold_what_the_pruner_chose(folder: Path, sizes: list[tuple[int, int]]) -> None:
    looker = Looker(load(folder), 2)
    images = [picture(*size, seed) for seed, size in enumerate(sizes)]
    question = Question.from_prompt("Which digit is red?", images)
    look = looker(question, Label("Which"))
    trace = looker.trace(looker.answerer.encode(question))
    assert trace.keep is not None
    kept = np.concatenate([grid.alive[0].ravel() for grid in look.grids])
    assert (kept == trace.keep.numpy()).all()
    for grid in look.grids:
        assert grid.curve is not None
        assert grid.curve.kept == grid.alive[0].sum()
        assert grid.curve.by_score
    index = torch.cat([grid.place.index for grid in look.grids])
    assert len(index.unique()) == len(index)
    assert index.max() < look.pruned.visual_in
    assert look.visual_counts[0] == look.pruned.visual_in
    assert look.visual_counts[-1] == look.pruned.visual_stage2


def test_text_alone_has_no_grid() -> None:
    look = Looker(load(MODEL), 2)(Question.from_prompt("Hello there"), Label("Hello there"))
    assert look.grids == ()
    assert look.visual_counts == ()
    assert {word.left for word in look.words} == {None}
    assert look.pruned.answer == look.dense.answer


def test_a_patch_family_shows_what_the_encoder_saw() -> None:
    """The picture is cut to its middle: a frame that is lost there is not on the page."""
    loaded = load_pretrained(MODEL, device="cpu")
    wide = Image.new("RGB", (192, 96), (255, 0, 0))
    wide.paste((0, 0, 255), (48, 0, 144, 96))
    encoded = Answerer(loaded).encode(Question.from_prompt("Which?", [wide]))
    (place,) = find_places(find_family(loaded.model), loaded.processor, encoded.inputs, [wide])
    assert place.seen
    assert place.picture.size == (96, 96)
    pixels = np.asarray(place.picture, dtype=int)
    assert (np.abs(pixels[:, 8:-8] - [0, 0, 255]) <= 1).all()
    assert place.index.tolist() == place.token.tolist() == list(range(144))


def test_a_class_token_that_is_kept_stands_before_the_grid() -> None:
    loaded = load_pretrained(MODEL, device="cpu")
    family = find_family(loaded.model)
    family.model.config.vision_feature_select_strategy = "full"
    pixels = torch.zeros(2, 3, 96, 96)
    places = find_places(family, loaded.processor, {"pixel_values": pixels}, [])
    assert [int(place.index[0]) for place in places] == [1, 146]
    assert [len(place.index) for place in places] == [144, 144]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_pictures_of_any_size_are_shown_as_given(name: str) -> None:
    family = find_family(build(name))
    layout = family.layout
    thw = torch.tensor([[1, 4, 8], [1, 6, 4]])
    pixels = torch.zeros(int(thw.prod(1).sum()), layout.width)
    images = [picture(64, 32), picture(32, 48)]
    inputs = {"pixel_values": pixels, "image_grid_thw": thw}
    processor = argparse.Namespace()  # nothing is asked of it
    places = find_places(family, processor, inputs, images)
    assert [(p.rows, p.columns) for p in places] == [(2, 4), (3, 2)]
    assert [p.picture for p in places] == images
    assert not any(p.seen for p in places)
    assert places[1].index.tolist() == list(range(8, 14))


def test_a_mosaic_lies_on_the_whole_picture(tmp_path: Path) -> None:
    loaded = load_pretrained(build_folder("llava_next", tmp_path), device="cpu")
    images = [picture(160, 96, 0), picture(96, 160, 1)]
    encoded = Answerer(loaded).encode(Question.from_prompt("Which?", images))
    places = find_places(find_family(loaded.model), loaded.processor, encoded.inputs, images)
    assert [p.seen for p in places] == [True, False, True, False]
    assert [p.picture for p in places if not p.seen] == images
    # Line ends are no part of a grid: the rows of a mosaic stand one position apart.
    mosaic = places[1]
    rows = mosaic.index.view(mosaic.rows, mosaic.columns)
    assert (rows[1:, 0] - rows[:-1, -1] == 2).all()


def test_tiles_that_fill_up_a_batch_are_left_out(tmp_path: Path) -> None:
    loaded = load_pretrained(build_folder("idefics3", tmp_path), device="cpu")
    images = [picture(160, 96), picture(48, 48)]
    encoded = Answerer(loaded).encode(Question.from_prompt("Which?", images))
    places = find_places(find_family(loaded.model), loaded.processor, encoded.inputs, images)
    assert all(place.seen for place in places)
    tokens = sum(len(place.index) for place in places)
    ids = encoded.inputs["input_ids"]
    assert tokens == int((ids == loaded.model.config.image_token_id).sum())
