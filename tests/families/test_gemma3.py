"""Gemma 3: average pooling, and rotary tables that depend on the layer's kind."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3ForConditionalGeneration

from itprune.families import find_family
from itprune.families.gemma3 import Gemma3
from tests import family_configs
from tests.families.paths import pooled, support, windows
from tests.family_models import build


@pytest.fixture(scope="module")
def family() -> Gemma3:
    found = find_family(build("gemma3"))
    assert isinstance(found, Gemma3)
    return found


def odd() -> Gemma3:
    """Seven patches a side, pooled by two: the last row and column belong to no token."""
    config = family_configs.gemma3(family_configs.TEXT).config
    config.vision_config.image_size = 28
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return Gemma3(model.eval())


def test_an_image_is_a_grid(family: Gemma3) -> None:
    geometry = family.geometry("image", {"pixel_values": torch.randn(3, 3, 24, 24)})
    assert geometry.grid.tolist() == [[3, 3]] * 3
    assert geometry.source.tolist() == [0, 1, 2]
    assert geometry.slots().tolist() == list(range(27))
    assert geometry.separator is None
    assert geometry.clip is None
    assert family.usual_grid == (3, 3)


@pytest.mark.parametrize("size", [24, 28])
def test_tokens_depend_on_the_patches_that_score_them(family: Gemma3, size: int) -> None:
    family = family if size == 24 else odd()
    arguments = {"pixel_values": torch.randn(2, 3, size, size)}
    shares = pooled(family, **arguments)
    torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)))
    assert torch.equal(shares > 0, support(family, **arguments))


def test_a_token_scores_the_mean_of_its_window(family: Gemma3) -> None:
    values = torch.randn(2 * 36)
    geometry = family.geometry("image", {"pixel_values": torch.zeros(2, 3, 24, 24)})
    torch.testing.assert_close(geometry.pool(values), windows(values, 6, 2))
    cut, values = odd(), torch.randn(49)
    geometry = cut.geometry("image", {"pixel_values": torch.zeros(1, 3, 28, 28)})
    assert geometry.grid.tolist() == [[3, 3]]
    assert cut.usual_grid == (3, 3)
    torch.testing.assert_close(geometry.pool(values), windows(values, 7, 2))


@pytest.mark.parametrize("size", [(24, 28), (32, 32), (0, 0)])
def test_other_sizes_are_refused(family: Gemma3, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="24 x 24 pixels only"):
        family.geometry("image", {"pixel_values": torch.zeros(1, 3, *size)})


def test_a_blank_image_is_encoded(family: Gemma3) -> None:
    features = family.model.get_image_features(**family.blank_image(), return_dict=True)
    assert features.pooler_output.shape == (1, 9, 32)
