"""Idefics3 and SmolVLM: square tiles, padded to the most of any row, merged by pixel shuffle."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from itprune import PruneConfig, attach
from itprune.families import find_family
from itprune.families.idefics3 import Idefics3, SmolVLM
from tests.families.paths import pooled, support, windows
from tests.family_models import build


@pytest.fixture(scope="module", params=["idefics3", "smolvlm"])
def family(request: pytest.FixtureRequest) -> Idefics3:
    found = find_family(build(request.param))
    assert isinstance(found, Idefics3)
    assert isinstance(found, SmolVLM) == (request.param == "smolvlm")
    return found


def padded(size: int = 24) -> Tensor:
    """Two rows of three tiles; the second row has one, and one that begins with a black corner."""
    pixels = torch.randn(2, 3, 3, size, size, generator=torch.Generator().manual_seed(0))
    pixels[1, 1:] = 0
    pixels[0, 2, :, :8] = 0
    return pixels


def encoded(family: Idefics3, pixels: Tensor, **more: Tensor) -> int:
    with torch.no_grad():
        output = family.model.get_image_features(pixels, **more, return_dict=True)
    return sum(t.reshape(-1, t.shape[-1]).shape[0] for t in output.pooler_output)


def test_padding_tiles_make_no_grid(family: Idefics3) -> None:
    geometry = family.geometry("image", {"pixel_values": padded()})
    assert geometry.grid.tolist() == [[3, 3]] * 4
    assert geometry.source.tolist() == [0, 1, 2, 3]
    assert geometry.slots().tolist() == list(range(36))
    assert geometry.separator is None
    assert geometry.clip is None
    assert encoded(family, padded()) == 36


def test_a_batch_of_padding_alone(family: Idefics3) -> None:
    pixels = torch.zeros(2, 2, 3, 24, 24)
    if isinstance(family, SmolVLM):  # encodes one, so that there is something to run on
        assert family.geometry("image", {"pixel_values": pixels}).grid.tolist() == [[3, 3]]
        assert encoded(family, pixels) == 9
    else:
        with pytest.raises(ValueError, match="all tiles are zeros"):
            family.geometry("image", {"pixel_values": pixels})
        with pytest.raises(RuntimeError):
            encoded(family, pixels)


def test_padding_is_what_the_host_rounds_to_zero(
    family: Idefics3, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = padded()
    pixels[1, 1] = 1e-9
    assert len(family.geometry("image", {"pixel_values": pixels}).grid) == 5
    family.model.half()
    try:
        assert len(family.geometry("image", {"pixel_values": pixels}).grid) == 4
    finally:
        family.model.float()


@pytest.mark.parametrize("size", [24, 32])
def test_tokens_depend_on_the_patches_that_score_them(family: Idefics3, size: int) -> None:
    arguments = {"pixel_values": padded(size)}
    shares = pooled(family, **arguments)
    torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)))
    assert torch.equal(shares > 0, support(family, **arguments))


def test_a_pixel_mask_changes_no_place(family: Idefics3) -> None:
    mask = torch.ones(2, 3, 24, 24, dtype=torch.long)
    mask[0, 0, 12:] = 0
    arguments = {"pixel_values": padded(), "pixel_attention_mask": mask}
    assert torch.equal(pooled(family, **arguments) > 0, support(family, **arguments))
    assert encoded(family, **{"pixels": padded(), "pixel_attention_mask": mask}) == 36


def test_a_token_scores_the_mean_of_its_window(
    family: Idefics3, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randn(4 * 36)
    geometry = family.geometry("image", {"pixel_values": padded()})
    torch.testing.assert_close(geometry.pool(values), windows(values, 6, 2))
    monkeypatch.setattr(family.model.config, "scale_factor", 3)
    geometry = family.geometry("image", {"pixel_values": padded()})
    assert geometry.grid.tolist() == [[2, 2]] * 4
    assert family.usual_grid == (2, 2)
    torch.testing.assert_close(geometry.pool(values), windows(values, 6, 3))


@pytest.mark.parametrize("size", [(24, 32), (20, 20), (16, 36), (4, 4)])
def test_tiles_the_host_would_tear_are_refused(family: Idefics3, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="square tiles"):
        family.geometry("image", {"pixel_values": torch.ones(1, 1, 3, *size)})


def test_a_blank_image_is_encoded(family: Idefics3) -> None:
    blank = family.blank_image()
    assert encoded(family, blank["pixel_values"]) == 9
    assert family.geometry("image", blank).grid.tolist() == [list(family.usual_grid)]


def test_masked_pixels_score_nothing(family: Idefics3, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tap sees the mask the encoder's attention gets: as eager attention weights it, asked by
    all patches but the masked ones."""
    model, mask = family.model, torch.ones(2, 3, 24, 24, dtype=torch.long)
    mask[0, 0, 12:], mask[1, 0, :, 16:] = 0, 0
    arguments = {"pixel_values": padded(), "pixel_attention_mask": mask}
    with (
        attach(model, PruneConfig("topk_cls", keep=0.5)) as pruner,
        pruner.tracing() as trace,
        torch.no_grad(),
    ):
        model.model.get_image_features(**arguments, return_dict=True)
    attention = family.block_attention(family.blocks[family.feature_block])
    module, found = sys.modules[type(attention).__module__], []
    eager = module.eager_attention_forward

    def record(block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = eager(block, *args, **kwargs)
        found.append(out[1])
        return out

    monkeypatch.setattr(module, "eager_attention_forward", record)
    family.tower.set_attn_implementation("eager")
    encoded(family, padded(), pixel_attention_mask=mask)
    family.tower.set_attn_implementation("sdpa")
    heads = found[family.feature_block].mean(1)
    seen = (heads > 0).any(1)
    weights = (heads * seen[:, :, None]).sum(1) / seen.sum(1, keepdim=True)
    weights = weights.flatten()
    expected = family.geometry("image", arguments).pool(weights)
    assert (trace.score - expected).abs().max() < 1e-5 * expected.max()
    assert not trace.score[6:9].any()
    assert not trace.score[29::3].any()
