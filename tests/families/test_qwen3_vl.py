"""Qwen3-VL: features added between decoder layers, and videos encoded as images."""

from __future__ import annotations

from typing import Any

import torch

from itprune.families.base import TokenFamily
from tests.families.qwen import call, encode, family_of
from tests.family_models import batch, placeholders, prompts


def decoder_arguments(family: TokenFamily, rows: tuple[Any, ...]) -> tuple[dict[str, Any], Any]:
    """What the decoder is called with on a batch, and where its visual tokens are."""
    found: dict[str, Any] = {}

    def look(module: object, args: object, kwargs: dict[str, Any]) -> None:
        found.update(kwargs)

    data = prompts(batch("qwen3_vl", family.model, rows))
    handle = family.text_model.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        family.model(**data)
    handle.remove()
    return found, placeholders(data)


def test_added_features_are_taken_out_of_the_call() -> None:
    family = family_of("qwen3_vl")
    for rows in [
        ((3, "image", 4), (2, "wide", 3)),
        ((3, "video", 4),),
        ((2, "image", 3, "video"),),
    ]:
        kwargs, visual = decoder_arguments(family, rows)
        levels = kwargs["deepstack_visual_embeds"]
        added = family.added_after_layers(kwargs)
        assert added is not None
        assert torch.equal(added.visual, visual)
        assert [tuple(level.shape) for level in added.levels] == [(int(visual.sum()), 32)] * 2
        assert all(torch.equal(a, b) for a, b in zip(added.levels, levels, strict=True))
        assert kwargs["visual_pos_masks"] is None
        assert kwargs["deepstack_visual_embeds"] is None


def test_text_alone_adds_nothing() -> None:
    family = family_of("qwen3_vl")
    kwargs, _ = decoder_arguments(family, ((7,), (5,)))
    before = dict(kwargs)
    assert family.added_after_layers(kwargs) is None
    assert kwargs.keys() == before.keys()
    assert all(kwargs[key] is before[key] for key in before)


def test_other_decoders_add_nothing() -> None:
    assert family_of("qwen2_vl").added_after_layers({"visual_pos_masks": None}) is None


def test_pictures_are_not_shrunk() -> None:
    family = family_of("qwen3_vl")
    arguments = call("image", ((1, 8, 8),))
    assert family.shrink("image", arguments, [(2, 2)]) is None


def test_a_video_is_encoded_as_images_are() -> None:
    """The host's own doing, which makes a call inside a call: frames attend within themselves, so
    one video equals its frames as images."""
    family = family_of("qwen3_vl")
    video = call("video", ((3, 4, 8),))
    images = {
        "pixel_values": video["pixel_values_videos"],
        "image_grid_thw": torch.tensor([[1, 4, 8]] * 3),
    }
    with torch.no_grad():
        (whole,) = encode(family, "video", video).pooler_output
        frames = encode(family, "image", images).pooler_output
    torch.testing.assert_close(whole, torch.cat(list(frames)))
