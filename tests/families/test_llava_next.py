"""LLaVA-NeXT: where the tokens of an overview and a mosaic stand, and what they are made of."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor

from itprune import PruneConfig, attach
from itprune.families import find_family
from itprune.geometry import Geometry
from tests.families.packed import weights_of, weights_of_the_host
from tests.families.paths import support
from tests.family_configs import IMAGE, TEXT, TILINGS, VISION
from tests.family_models import build
from tests.oracle import drops_of, masked, recorded_rows

SIZES = ((24, 48), (48, 16), (40, 40), (20, 50))
"""Their tiles: 2, 2, 4 and 2 beside the overview; the mosaics of all but the first have margins."""
SIDE, PATCHES = 6, 36


def siglip_tower() -> hf.PreTrainedModel:
    """No class token, and features of several blocks joined."""
    torch.manual_seed(0)
    config = hf.LlavaNextConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=TILINGS,
        vision_feature_layer=[-3, -2],
        vision_feature_select_strategy="full",
    )
    return hf.LlavaNextForConditionalGeneration(config).eval()


MODELS = {"clip": lambda: build("llava_next"), "siglip": siglip_tower}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> hf.PreTrainedModel:
    return MODELS[request.param]()


def inputs(sizes: tuple = SIZES, tiles: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(len(sizes), tiles, 3, 24, 24, generator=generator),
        "image_sizes": torch.tensor(sizes),
    }


def geometry(model: hf.PreTrainedModel, data: dict[str, Tensor]) -> Geometry:
    return find_family(model).geometry("image", data)


def features(model: hf.PreTrainedModel, data: dict[str, Tensor]) -> Tensor:
    return torch.cat(model.model.get_image_features(**data, return_dict=True).pooler_output)


# ------------------------------------------------------------------------------------ layout
def test_an_image_is_an_overview_and_a_mosaic_without_its_margins(model) -> None:
    found = geometry(model, inputs())
    square = [SIDE, SIDE]
    # 24 x 48 fills two tiles; the others leave margins of their tiles empty.
    mosaics = [[6, 12], [12, 4], [12, 12], [4, 12]]
    assert found.grid.tolist() == [grid for mosaic in mosaics for grid in (square, mosaic)]
    assert found.source.tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5, 5, 5, 6, 7, 7]
    assert found.clip is None


def test_newlines_are_separators_of_the_row_before_them(model) -> None:
    data = inputs()
    found, out = geometry(model, data), features(model, data)
    newline = (out == model.model.image_newline).all(1)
    assert torch.equal(found.slots(), (~newline).nonzero()[:, 0])
    per_grid = found.separator.split(found.lens.tolist())
    assert all((overview == -1).all() for overview in per_grid[::2])
    for mosaic, slots, (rows, columns) in zip(
        per_grid[1::2],
        found.slots().split(found.lens.tolist())[1::2],
        found.grid[1::2],
        strict=True,
    ):
        assert torch.equal(mosaic.view(rows, columns)[:, 0], slots.view(rows, columns)[:, -1] + 1)
        assert (mosaic.view(rows, columns) == mosaic.view(rows, columns)[:, :1]).all()
    separators = torch.cat(per_grid)
    assert torch.equal(separators[separators >= 0].unique(), newline.nonzero()[:, 0])


def test_scores_follow_tiles_into_the_mosaic(model) -> None:
    """By hand: 48 x 16 pixels are two tiles one above the other, in columns 1 to 4."""
    found = geometry(model, inputs(((48, 16),)))
    score = torch.rand(3, SIDE, SIDE)
    by_hand = [score[0, r, c] for r in range(6) for c in range(6)]
    by_hand += [score[1 + r // 6, r % 6, c] for r in range(12) for c in range(1, 5)]
    assert torch.equal(found.pool(score.flatten()), torch.stack(by_hand))


def test_tiles_without_a_batch_of_images(model) -> None:
    data = inputs(((24, 48), (48, 48)))
    pixels = data["pixel_values"]
    flat = {**data, "pixel_values": torch.cat([pixels[0, :3], pixels[1, :5]])}
    assert torch.equal(geometry(model, flat).grid, geometry(model, data).grid)
    assert torch.equal(features(model, flat), features(model, data))


def test_a_newline_stays_as_long_as_a_token_of_its_row(model) -> None:
    data = inputs()
    found, before = geometry(model, data), features(model, data)
    with attach(model, PruneConfig("random", keep=0.1)):
        after = features(model, data)
    stays = after.abs().sum(1) > 0
    token = stays[found.slots()]
    per_grid = token.split(found.lens.tolist())
    assert [int(g.sum()) for g in per_grid] == [round(0.1 * len(g)) for g in per_grid]
    expected = torch.zeros_like(stays)
    expected[found.slots()[token]] = True
    separator = found.separator[token]
    expected[separator[separator >= 0]] = True
    assert torch.equal(stays, expected)
    assert torch.equal(after[stays], before[stays])
    newlines = found.separator[found.separator >= 0].unique()
    assert 0 < int(stays[newlines].sum()) < len(newlines)


@pytest.mark.parametrize(("size", "slots"), [((2, 400), PATCHES), ((400, 2), PATCHES + 6)])
def test_an_image_too_thin_for_a_mosaic_is_its_overview(model, size, slots) -> None:
    data = inputs((size, (24, 48)))
    found = geometry(model, data)
    assert found.grid.tolist() == [[SIDE, SIDE], [SIDE, SIDE], [SIDE, 12]]
    assert found.source.tolist() == [0, 0, 0, 1, 2, 2]
    assert int(found.slots()[PATCHES]) == slots
    assert len(features(model, data)) == slots + PATCHES + 6 * 13


# ------------------------------------------------------------------------------------ derivatives
def test_pool_weighs_patches_as_the_host_does(model) -> None:
    data = inputs()
    found = geometry(model, data)
    host = weights_of_the_host(model, lambda: features(model, data))
    assert torch.equal(weights_of(found, host.shape[1]), host[found.slots()])
    rest = torch.ones(len(host), dtype=torch.bool)
    rest[found.slots()] = False
    assert not host[rest].any()


def test_tokens_are_made_of_patches_of_the_feature_block(model) -> None:
    data = inputs(((48, 16), (40, 40)))
    found, behind = geometry(model, data), support(find_family(model), **data)
    assert torch.equal(weights_of(found, behind.shape[1]) > 0, behind[found.slots()])


# ------------------------------------------------------------------------------------ the rest
def test_the_names_of_its_parts(model) -> None:
    family = find_family(model)
    assert family.has_cls == (model.config.vision_config.model_type == "clip_vision_model")
    assert (family.query_key(family.blocks[0]) is None) == family.has_cls
    assert family.feature_block == 1
    assert family.usual_grid == (SIDE, SIDE)
    assert family.placeholders == {"image": IMAGE}
    assert family.projectors == (model.model.multi_modal_projector,)
    assert len(family.layers) == family.host.depth == 6


def test_a_blank_image(model) -> None:
    blank = find_family(model).blank_image()
    found = geometry(model, blank)
    assert blank["pixel_values"].shape[1] == 3  # as few tiles as the host can do with
    assert len(features(model, blank)) == int(found.lens.sum()) + 6


@pytest.mark.parametrize("method", ["topk_cls", "random"])
def test_a_newline_that_speaks_the_answer_stays(model, method: str) -> None:
    """Without a word between image and answer, the answer follows the last newline."""
    data = inputs(((24, 48),))
    slots = len(features(model, data))
    ids = torch.tensor([[1, 5, 6, *[IMAGE] * slots, 9, 10, 11]])
    labels = torch.where(ids > 8, ids, -100).masked_fill(ids == IMAGE, -100)
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **data}
    with attach(model, PruneConfig(method, keep=0.02)), recorded_rows(model) as found:
        loss = model(**call).loss
    gone = drops_of(found)[0][0]
    assert not gone[2 + slots]
    assert int(gone.sum()) > slots // 2
    with masked(model, drops_of(found)):
        assert abs(loss - model(**call).loss) < 1e-5


def test_windows_are_refused(model) -> None:
    with pytest.raises(ValueError, match="window"):
        find_family(model).slot_grids(36)


def test_what_the_host_cannot_select_is_refused(model) -> None:
    wrong = "full" if find_family(model).has_cls else "default"
    data = {**inputs(), "vision_feature_select_strategy": wrong}
    with pytest.raises(RuntimeError):  # the bare model
        features(model, data)
    with pytest.raises(ValueError, match="vision_feature_select_strategy"):
        geometry(model, data)


BAD = {
    "fewer tiles than the size stands for": (
        lambda d: {**d, "pixel_values": d["pixel_values"][:, :4]},
        "tiles",
    ),
    "one image too many": (lambda d: {**d, "image_sizes": d["image_sizes"][:3]}, "tiles"),
    "tiles of two images of three": (
        lambda d: {**d, "pixel_values": d["pixel_values"].flatten(0, 1)},
        "tiles",
    ),
    "no tiles at all": (lambda d: {**d, "pixel_values": d["pixel_values"][:, :0]}, "tiles"),
    "tiles without pixels": (
        lambda d: {**d, "pixel_values": d["pixel_values"][..., :0]},
        "24 x 24",
    ),
    "tiles of another size": (
        lambda d: {**d, "pixel_values": d["pixel_values"][..., :20]},
        "24 x 24",
    ),
    "one picture": (lambda d: {**d, "pixel_values": d["pixel_values"][0, 0]}, "24 x 24"),
    "no sizes": (lambda d: {"pixel_values": d["pixel_values"]}, "image_sizes"),
    "an empty image": (lambda d: {**d, "image_sizes": d["image_sizes"] * 0}, "image_sizes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(model, case: str) -> None:
    spoil, words = BAD[case]
    with pytest.raises(ValueError, match=words) as error:
        geometry(model, spoil(inputs()))
    assert "\n" not in str(error.value)


def test_an_unknown_encoder_is_refused() -> None:
    config = hf.LlavaNextConfig(
        vision_config=hf.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        text_config=hf.LlamaConfig(**TEXT),
        image_grid_pinpoints=TILINGS,
    )
    with pytest.raises(ValueError, match="dinov2"):
        find_family(hf.LlavaNextForConditionalGeneration(config))
