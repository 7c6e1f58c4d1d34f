"""LLaVA-OneVision: mosaics made smaller, several images of a sample, and clips of frames."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers as hf
from torch import Tensor

from itprune import PruneConfig, attach
from itprune.families import find_family
from itprune.geometry import Geometry
from tests.families.packed import weights_of, weights_of_the_host
from tests.families.paths import support
from tests.family_configs import IMAGE, TEXT, VIDEO, VISION
from tests.family_models import batch, build
from tests.family_oracle import PROMPT

SIZES = ((24, 48), (48, 16), (48, 40))
"""The last mosaic, 12 x 10 patches, is more than two tiles by far: the host makes it smaller."""
SIDE, PATCHES = 6, 36


@pytest.fixture(scope="module")
def model() -> hf.PreTrainedModel:
    return build("llava_onevision")


@pytest.fixture(scope="module")
def odd() -> hf.PreTrainedModel:
    """7 x 7 patches a tile, which pooling does not halve evenly."""
    torch.manual_seed(0)
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**{**VISION, "image_size": 28}, vision_use_head=False),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=[[28, 56], [56, 56]],
    )
    return hf.LlavaOnevisionForConditionalGeneration(config).eval()


def inputs(sizes: tuple = SIZES, **more: object) -> dict:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(len(sizes), 5, 3, 24, 24, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes), **more}


def geometry(model: hf.PreTrainedModel, data: dict) -> Geometry:
    return find_family(model).geometry("image", data)


def features(model: hf.PreTrainedModel, data: dict) -> Tensor:
    return torch.cat(model.model.get_image_features(**data, return_dict=True).pooler_output)


def clip_inputs(model: hf.PreTrainedModel, clips: int = 2, frames: int = 3) -> dict[str, Tensor]:
    side = model.config.vision_config.image_size
    name = next(iter(inspect.signature(model.model.get_video_features).parameters))
    return {
        name: torch.randn(clips, frames, 3, side, side, generator=torch.Generator().manual_seed(0))
    }


def clip_features(model: hf.PreTrainedModel, data: dict[str, Tensor]) -> Tensor:
    return model.model.get_video_features(**data, return_dict=True).pooler_output.flatten(0, 1)


def clip_geometry(model: hf.PreTrainedModel, data: dict[str, Tensor]) -> Geometry:
    return find_family(model).geometry("video", data)


def inside(data: dict[str, Tensor]) -> int:
    """Newlines at the end of a clip's features: since transformers 5.18."""
    return int("pixel_values_videos" in data)


# ------------------------------------------------------------------------------------ images
def test_large_mosaics_are_made_smaller(model) -> None:
    data = inputs()
    found = geometry(model, data)
    # 12 x 10 patches by the square root of 120 / (2 * 36).
    assert found.grid.tolist() == [[6, 6], [6, 12], [6, 6], [12, 4], [6, 6], [9, 7]]
    assert len(features(model, data)) == int(found.lens.sum()) + 6 + 12 + 9


def test_the_limit_may_come_with_the_call(model) -> None:
    data = inputs(vision_aspect_ratio="anyres_max_9")
    found = geometry(model, data)
    assert found.grid[-1].tolist() == [12, 10]
    assert len(features(model, data)) == int(found.lens.sum()) + 6 + 12 + 12


def test_several_images_of_a_sample_are_one_tile_each(model) -> None:
    data = inputs(batch_num_images=torch.tensor([2, 0, 1]))
    found = geometry(model, data)
    assert found.grid.tolist() == [[6, 6], [6, 6], [6, 6], [9, 7]]
    assert found.source.tolist() == [0, 1, 2, 3, 3, 3, 3]
    # An image of one tile ends in a newline, which goes with all its tokens.
    assert found.separator[:72].tolist() == [36] * 36 + [73] * 36
    assert (found.separator[72:108] == -1).all()
    out = features(model, data)
    newline = (out == model.model.image_newline).all(1).nonzero()[:, 0]
    assert torch.equal(found.separator[found.separator >= 0].unique(), newline)
    assert len(out) == int(found.lens.sum()) + len(newline)


@pytest.mark.parametrize("together", [None, [2, 1], [1, 1, 1], [3]])
def test_pool_weighs_patches_as_the_host_does(model, together) -> None:
    data = inputs(batch_num_images=None if together is None else torch.tensor(together))
    found = geometry(model, data)
    host = weights_of_the_host(model, lambda: features(model, data))
    torch.testing.assert_close(weights_of(found, host.shape[1]), host[found.slots()])
    rest = torch.ones(len(host), dtype=torch.bool)
    rest[found.slots()] = False
    assert not host[rest].any()


def test_a_smaller_mosaic_by_hand(model) -> None:
    """Each token lies between two by two patches, the nearer ones weighing more."""
    score = torch.rand(5, SIDE, SIDE)
    found = geometry(model, inputs(((48, 40),)))
    board = torch.cat([torch.cat([score[1], score[2]], 1), torch.cat([score[3], score[4]], 1)])
    board = board[:, 1:11]
    by_hand = []
    for row in range(9):
        for column in range(7):
            y = max((row + 0.5) * 12 / 9 - 0.5, 0)
            x = max((column + 0.5) * 10 / 7 - 0.5, 0)
            r, c = int(y), int(x)
            near = board[r : r + 2, c : c + 2]
            dy = torch.tensor([1 - (y - r), y - r])[: len(near)]
            dx = torch.tensor([1 - (x - c), x - c])[: near.shape[1]]
            by_hand.append(dy @ near @ dx)
    pooled = found.pool(score.flatten())
    assert torch.equal(pooled[:36], score[0].flatten())
    torch.testing.assert_close(pooled[36:], torch.stack(by_hand))


def test_tokens_are_made_of_patches_of_the_last_block(model) -> None:
    data, family = inputs(((48, 40),)), find_family(model)
    found, behind = geometry(model, data), support(family, **data)
    assert family.feature_block == 2
    assert torch.equal(weights_of(found, behind.shape[1]) > 0, behind[found.slots()])


# ------------------------------------------------------------------------------------ videos
@pytest.mark.parametrize("frames", [1, 3])
def test_frames_are_grids_and_clips_end_in_a_newline(model, frames: int) -> None:
    data = clip_inputs(model, frames=frames)
    found, out, end = clip_geometry(model, data), clip_features(model, data), inside(data)
    assert found.grid.tolist() == [[3, 3]] * 2 * frames  # a quarter of a frame's patches
    assert found.clip.tolist() == [0] * frames + [1] * frames
    assert found.source.tolist() == list(range(2 * frames))
    assert len(out) == 2 * (9 * frames + end)
    newline = (out == model.model.image_newline).all(1)
    assert int(newline.sum()) == 2 * end
    assert torch.equal(found.slots(), (~newline).nonzero()[:, 0])
    if end:
        own = found.separator.view(2, -1)
        assert (own == newline.nonzero()).all()
    else:
        assert found.separator is None


def test_clips_as_tall_grids(model) -> None:
    tall = clip_geometry(model, clip_inputs(model)).by_clip()
    assert tall.grid.tolist() == [[9, 3], [9, 3]]
    assert tall.source.tolist() == [0, 0, 0, 1, 1, 1]


def test_tokens_of_a_frame_are_means_of_four_patches(model) -> None:
    score = torch.rand(2 * 3, SIDE, SIDE)
    by_hand = score.view(6, 3, 2, 3, 2).mean((2, 4)).flatten()
    pooled = clip_geometry(model, clip_inputs(model)).pool(score.flatten())
    torch.testing.assert_close(pooled, by_hand)


@pytest.mark.parametrize(("video", "each"), [("frame", [3] * 6), ("clip", [9, 9])])
def test_budgets_of_frames_and_clips(model, video: str, each: list[int]) -> None:
    data = clip_inputs(model)
    found, before = clip_geometry(model, data), clip_features(model, data)
    with attach(model, PruneConfig("random", keep=1 / 3, video=video)):
        after = clip_features(model, data)
    stays = after.abs().sum(1) > 0
    groups = found.by_clip() if video == "clip" else found
    assert [int(g.sum()) for g in stays[found.slots()].split(groups.lens.tolist())] == each
    assert int(stays.sum()) == 18 + 2 * inside(data)  # each clip's newline stays with its tokens
    assert torch.equal(after[stays], before[stays])


@pytest.mark.parametrize("which", ["model", "odd"])
def test_pool_weighs_patches_of_frames_as_the_host_does(which, request) -> None:
    model = request.getfixturevalue(which)
    data = clip_inputs(model, frames=2)
    found = clip_geometry(model, data)
    host = weights_of_the_host(model, lambda: clip_features(model, data))
    torch.testing.assert_close(weights_of(found, host.shape[1]), host[found.slots()])
    assert found.grid[0].tolist() == ([3, 3] if which == "model" else [4, 4])


# ------------------------------------------------------------------------------------ the rest
def test_the_names_of_its_parts(model) -> None:
    family = find_family(model)
    attention = family.block_attention(family.blocks[0])
    assert not family.has_cls
    assert family.query_key(family.blocks[0]) == (attention.q_proj, attention.k_proj)
    assert family.placeholders == {"image": IMAGE, "video": VIDEO}
    assert family.usual_grid == (SIDE, SIDE)


def test_a_blank_image(model) -> None:
    blank = find_family(model).blank_image()
    assert len(features(model, blank)) == int(geometry(model, blank).lens.sum()) + 6


BAD_CLIPS = {
    "no frames": lambda pixels: pixels[:, :0],
    "no clips": lambda pixels: pixels[:0],
    "frames of another size": lambda pixels: pixels[..., :20],
    "one clip": lambda pixels: pixels[0],
}


@pytest.mark.parametrize("case", BAD_CLIPS)
def test_bad_clips_are_one_sentence(model, case: str) -> None:
    data = {name: BAD_CLIPS[case](pixels) for name, pixels in clip_inputs(model).items()}
    with pytest.raises(ValueError, match="one or more frames of 24 x 24") as error:
        clip_geometry(model, data)
    assert "\n" not in str(error.value)


BAD = {
    "samples speak of other images": (
        {"batch_num_images": torch.tensor([1, 1])},
        "batch_num_images",
    ),
    "the first patch taken for a class token": (
        {"vision_feature_select_strategy": "default"},
        "vision_feature_select_strategy",
    ),
    "sizes of other images": ({"image_sizes": torch.tensor([[24, 48]])}, "tiles"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(model, case: str) -> None:
    more, words = BAD[case]
    with pytest.raises(ValueError, match=words) as error:
        geometry(model, {**inputs(), **more})
    assert "\n" not in str(error.value)


def test_videos_without_a_class_token_to_take_away_are_refused(model) -> None:
    data = {**clip_inputs(model), "vision_feature_select_strategy": "default"}
    with pytest.raises(RuntimeError):  # the bare model
        clip_features(model, data)
    with pytest.raises(ValueError, match="vision_feature_select_strategy"):
        clip_geometry(model, data)


def test_each_clip_is_read_with_its_own_question(model) -> None:
    """Also where the host puts the newline behind the features itself (transformers 5.17)."""
    rows = ((5, "video", 6, "answer"), (2, "video", 9, "answer"))
    with attach(model, PruneConfig("cdpruner", keep=0.3), prompt=PROMPT), torch.no_grad():
        both = model(**batch("llava_onevision", model, rows)).logits[1]
        alone = model(**batch("llava_onevision", model, rows, order=(1,))).logits[0]
    assert (both[: len(alone)] - alone).abs().max() < 1e-5
