"""PaliGemma: a token is a patch; without a mask its decoder looks in both directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from itprune.families import find_family
from itprune.families.paligemma import PaliGemma
from tests.families.paths import pooled, support
from tests.family_configs import IMAGE
from tests.family_models import build


@pytest.fixture(scope="module", params=["paligemma", "paligemma_2"])
def family(request: pytest.FixtureRequest) -> PaliGemma:
    found = find_family(build(request.param))
    assert isinstance(found, PaliGemma)
    return found


def test_a_patch_is_a_token(family: PaliGemma) -> None:
    geometry = family.geometry("image", {"pixel_values": torch.randn(3, 3, 24, 24)})
    assert geometry.grid.tolist() == [[6, 6]] * 3
    assert geometry.source.tolist() == [0, 1, 2]
    assert geometry.slots().tolist() == list(range(108))
    assert geometry.separator is None
    assert geometry.clip is None
    assert family.usual_grid == (6, 6)
    values = torch.randn(108)
    assert torch.equal(geometry.pool(values), values)


def test_tokens_depend_on_the_patches_that_score_them(family: PaliGemma) -> None:
    arguments = {"pixel_values": torch.randn(2, 3, 24, 24)}
    shares = pooled(family, **arguments)
    assert torch.equal(shares, torch.eye(72))
    assert torch.equal(shares > 0, support(family, **arguments))


def test_images_without_a_patch_are_refused(family: PaliGemma) -> None:
    with pytest.raises(ValueError, match="hold no patch"):
        family.geometry("image", {"pixel_values": torch.zeros(1, 3, 24, 3)})


def test_a_blank_image_is_encoded(family: PaliGemma) -> None:
    features = family.model.get_image_features(**family.blank_image(), return_dict=True)
    assert features.pooler_output.shape == (1, 36, 32)


def test_without_a_mask_it_looks_in_both_directions() -> None:
    family, masks = find_family(build("paligemma")), []
    assert not family.causal
    ids = torch.tensor([[IMAGE] * 36 + [5, 6, 7]])
    pixels = torch.randn(1, 3, 24, 24)
    handle = family.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        one = family.model(input_ids=ids, pixel_values=pixels).logits
        ids[0, -1] = 9
        other = family.model(input_ids=ids, pixel_values=pixels).logits
    handle.remove()
    assert masks == [None, None]
    assert not torch.equal(one[0, 0], other[0, 0])


def test_gemma_2_caps_its_scores() -> None:
    assert find_family(build("paligemma")).eager is None
    family = find_family(build("paligemma_2"))
    assert family.eager is not None
    attention: Any = family.attention(family.layers[0])
    query, key, value = (torch.randn(1, heads, 5, 8) for heads in (4, 2, 2))
    out, weights = family.eager(attention, query, key, value, None, scaling=0.3, softcap=2.0)
    score = 2.0 * torch.tanh(query @ key.repeat_interleave(2, 1).mT * 0.3 / 2.0)
    torch.testing.assert_close(weights, score.softmax(-1))
    assert out.shape == (1, 5, 4, 8)
