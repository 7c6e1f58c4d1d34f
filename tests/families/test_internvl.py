"""InternVL: square tiles with a class token, merged by pixel shuffle."""

from __future__ import annotations

import pytest
import torch

from itprune.families import find_family
from itprune.families.internvl import InternVL
from tests.families.paths import pooled, support, windows
from tests.family_models import build


@pytest.fixture(scope="module")
def family() -> InternVL:
    found = find_family(build("internvl"))
    assert isinstance(found, InternVL)
    return found


def test_a_tile_is_a_grid(family: InternVL) -> None:
    geometry = family.geometry("image", {"pixel_values": torch.randn(3, 3, 24, 24)})
    assert geometry.grid.tolist() == [[3, 3]] * 3
    assert geometry.source.tolist() == [0, 1, 2]
    assert geometry.slots().tolist() == list(range(27))
    assert geometry.separator is None
    assert geometry.clip is None
    assert family.usual_grid == (3, 3)
    assert family.host.feature_block == 2


@pytest.mark.parametrize("layer", [-1, -2, 3, 1])
@pytest.mark.parametrize("size", [24, 32])
def test_tokens_depend_on_the_patches_that_score_them(
    family: InternVL, layer: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family.model.config, "vision_feature_layer", layer)
    arguments = {"pixel_values": torch.randn(2, 3, size, size)}
    shares = pooled(family, **arguments)
    torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)))
    assert torch.equal(shares > 0, support(family, **arguments))


def test_a_token_scores_the_mean_of_its_window(family: InternVL) -> None:
    geometry = family.geometry("image", {"pixel_values": torch.randn(2, 3, 32, 32)})
    values = torch.randn(2 * 64)
    torch.testing.assert_close(geometry.pool(values), windows(values, 8, 2))


@pytest.mark.parametrize("size", [(24, 32), (28, 28), (16, 36), (0, 0)])
def test_tiles_the_host_would_tear_are_refused(family: InternVL, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="square tiles"):
        family.geometry("image", {"pixel_values": torch.zeros(1, 3, *size)})


def test_a_layer_other_than_the_scored_one_is_refused(family: InternVL) -> None:
    arguments = {"pixel_values": torch.zeros(1, 3, 24, 24), "vision_feature_layer": -1}
    assert family.geometry("image", arguments).grid.tolist() == [[3, 3]]
    with pytest.raises(ValueError, match="set it in the config"):
        family.geometry("image", {**arguments, "vision_feature_layer": -2})


def test_a_blank_image_is_encoded(family: InternVL) -> None:
    features = family.model.get_image_features(**family.blank_image(), return_dict=True)
    assert features.pooler_output.shape == (1, 9, 32)
