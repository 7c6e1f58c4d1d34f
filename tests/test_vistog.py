"""Hard groups, empty groups, and the straight-through sample of training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from itprune.methods.vistog import Grouping
from tests.handmade import (
    WIDTH,
    built,
    contents,
    image,
    images_of,
    seeded,
    shaken,
    with_extra,
)


def test_vistog_groups_hard_and_averages() -> None:
    method = built("vistog", tokens=6)
    parts = [image(12, 12, 0), image(6, 10, 3)]
    images = with_extra(method, *parts)
    kept = method(images)
    assert int(kept.keep.sum()) == 12
    rows = contents(kept).view(2, 6, WIDTH)
    norm = nn.functional.layer_norm
    for index, part in enumerate(parts):
        tokens = images.extra[index]
        likeness = norm(tokens, (WIDTH,)) @ norm(part["features"], (WIDTH,)).T
        group = likeness.argmax(0)
        for number in range(6):
            members = part["features"][group == number]
            expected = members.mean(0) if len(members) else tokens[number]
            assert torch.allclose(rows[index, number], expected, atol=1e-5)


def test_an_empty_group_keeps_its_token_at_any_weights() -> None:
    grouping = shaken(Grouping(WIDTH, 1.0)).eval()
    tokens, patches = seeded(1, 40, WIDTH, seed=0), seeded(1, 3, WIDTH, seed=1)
    filled = torch.ones(1, 3, dtype=torch.bool)
    empty = grouping.assign(tokens, patches)[0].sum(1) == 0
    assert empty.sum() >= 37
    assert torch.equal(grouping(tokens, patches, filled)[0][empty], tokens[0][empty])


def test_vistog_in_training_is_a_straight_through_sample() -> None:
    grouping = shaken(Grouping(WIDTH, 0.7)).train()
    tokens, patches = seeded(2, 5, WIDTH, seed=0), seeded(2, 30, WIDTH, seed=1)
    torch.manual_seed(3)
    share = grouping.assign(tokens, patches)
    assert torch.equal(share.sum(1), torch.ones(2, 30))
    assert set(share.unique().tolist()) == {0.0, 1.0}
    torch.manual_seed(3)
    assert torch.equal(share, grouping.assign(tokens, patches))
    assert not torch.equal(share, grouping.assign(tokens, patches))
    weight = seeded(*share.shape, seed=2)
    found = torch.autograd.grad((share * weight).sum(), grouping.query.weight)[0]
    torch.manual_seed(3)
    query = grouping.query(grouping.norm_tokens(tokens))
    key = grouping.key(grouping.norm_patches(patches))
    logits = query @ key.transpose(1, 2) / WIDTH**0.5
    gumbel = -torch.empty_like(logits).exponential_().log()
    soft = ((logits + gumbel) / 0.7).softmax(1)
    expected = torch.autograd.grad((soft * weight).sum(), grouping.query.weight)[0]
    assert torch.allclose(found, expected, atol=1e-5)
    quiet = grouping.eval().assign(tokens, patches)
    assert torch.equal(quiet.argmax(1), logits.argmax(1))


def test_vistog_counts() -> None:
    assert len(built("vistog").tower_tokens()) == 64
    assert len(built("vistog", 0.25).tower_tokens()) == 36
    assert len(built("vistog", 0.25, tokens=10).tower_tokens()) == 10
    many = built("vistog")
    small = with_extra(many, image(6, 6, 0))
    with pytest.raises(ValueError, match=r"prune.tokens: 64 .* 36"):
        many(small)
    with pytest.raises(ValueError, match="takes tokens beside the patches"):
        built("vistog")(images_of(image(12, 12, 0)))
    with pytest.raises(ValueError, match=r"prune.temperature"):
        built("vistog", temperature=0)
