"""Scores of every family: what is tapped is the attention the encoder really pays, and what is
pooled is what the projector really merges."""

from __future__ import annotations

import sys
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor

from itprune import PruneConfig, attach
from itprune.families import find_family
from itprune.families.base import Family, TokenFamily
from itprune.geometry import Geometry
from itprune.methods import register_method
from itprune.methods.base import Method
from itprune.tokens import Images, Kept, keep_all
from tests.family_models import CLIPS, NAMES, VIDEO_FAMILIES, batch, build, prompts

KINDS = [(name, "image") for name in NAMES] + [(name, "video") for name in VIDEO_FAMILIES]
TOKENS = [(name, kind) for name, kind in KINDS if name != "llava"]
"""LLaVA-1.5 has no tokens but the patches themselves."""
ROWS = {
    "image": ((3, "image", 4), (2, "wide", 5), (1, "image", 2, "wide", 3), (4,)),
    "video": ((3, "video", 4), (1, "video", 2, "video", 3)),
}
WEIGHTED = {"llava_onevision"}
"""Large mosaics and frames are interpolated: patches count with different weights."""


@register_method("score_probe")
class ScoreProbe(Method):
    """Drops nothing and remembers what it was shown."""

    places = ("before_llm",)

    def before_llm(self, images: Images) -> Kept:
        self.seen = images.salience("attention")
        self.lens = images.lens
        return keep_all(images)


def call(model: torch.nn.Module, data: dict[str, Tensor], kind: str) -> tuple[Any, dict]:
    """The encoder's output for a batch, and the arguments it was called with."""
    encode = getattr(model.model, f"get_{kind}_features")
    pixels = "pixel_values_videos" if kind == "video" else "pixel_values"
    sizes = f"{kind}_grid_thw", "image_sizes", "batch_num_images"
    if kind == "video":
        sizes = sizes[:1]
    arguments = {key: data[key] for key in sizes if key in data}
    output = encode(data[pixels], **arguments, return_dict=True)
    own = next(iter(signature(encode).parameters))
    return output, {own: data[pixels], **arguments}


def features_of(output: Any) -> Tensor:
    """(S, W) all slots."""
    return torch.cat([image.flatten(0, -2) for image in output.pooler_output])


class Leaf:
    """What the encoder's last block hands on, cut off from everything before it."""

    def __init__(self, family: Family, has_cls: bool) -> None:
        # Windowed encoders are scored in a block before the last.
        merged = family.position_axes > 1
        index = len(family.blocks) - 1 if merged else family.feature_block
        self.has_cls = has_cls
        self.handle = family.blocks[index].register_forward_hook(self._cut, prepend=True)

    def _cut(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        self.hidden = hidden.detach().requires_grad_()
        return (self.hidden, *output[1:]) if isinstance(output, tuple) else self.hidden

    def reach(self, value: Tensor) -> Tensor:
        """(P,) bool: the patches a scalar depends on."""
        (gradient,) = torch.autograd.grad(value, self.hidden, retain_graph=True)
        size = gradient.abs().sum(-1)
        if self.has_cls:
            assert not size[:, 0].any()
            size = size[:, 1:]
        return (size > 1e-7 * size.max()).flatten() & (size.flatten() > 0)


def weights(geometry: Geometry, patches: int) -> Tensor:
    """(V, P) how much each patch counts in each token's score."""
    return torch.stack([geometry.pool(row) for row in torch.eye(patches)], 1)


@pytest.mark.parametrize(("name", "kind"), TOKENS)
def test_scores_are_pooled_like_features(name: str, kind: str) -> None:
    """The support of d token / d patch through the model's own path is what `pool` averages."""
    model = build(name)
    family = find_family(model)
    assert isinstance(family, TokenFamily)
    leaf = Leaf(family, family.has_cls)
    output, arguments = call(model, batch(name, model, ROWS[kind]), kind)
    leaf.handle.remove()
    geometry, features = family.geometry(kind, arguments), features_of(output)
    direction = torch.randn(features.shape[1], generator=torch.Generator().manual_seed(3))
    slots = geometry.slots()
    reached = torch.stack([leaf.reach(features[slot] @ direction) for slot in slots])
    pooled = weights(geometry, reached.shape[1])
    assert torch.equal(pooled > 1e-7, reached)
    assert (pooled.sum(1) - 1).abs().max() < 1e-5
    if name not in WEIGHTED:
        share = reached.float() / reached.sum(1, keepdim=True)
        assert (pooled - share).abs().max() < 1e-6
    others = set(range(len(features))) - set(slots.tolist())
    for slot in others:  # separators hold no part of the image
        assert not leaf.reach(features[slot] @ direction).any()
    named = set() if geometry.separator is None else set(geometry.separator.tolist()) - {-1}
    assert named == others


@pytest.mark.parametrize(("name", "kind"), TOKENS)
def test_grids_hold_the_tokens(name: str, kind: str) -> None:
    """Every slot is a token or a separator; a separator ends the run of tokens that name it."""
    model = build(name)
    output, arguments = call(model, batch(name, model, ROWS[kind]), kind)
    geometry = find_family(model).geometry(kind, arguments)
    slots = geometry.slots()
    assert len(slots) == int(geometry.lens.sum())
    assert bool((slots.diff() > 0).all())
    if geometry.separator is None:
        assert slots.tolist() == list(range(len(features_of(output))))
    else:
        for separator in set(geometry.separator.tolist()) - {-1}:
            run = slots[geometry.separator == separator]
            assert run.tolist() == list(range(separator - len(run), separator))
    if kind == "video":
        clips = sum(part in CLIPS for row in ROWS[kind] for part in row)
        assert geometry.clip is not None
        assert geometry.clip.bincount().tolist() == [3] * clips


def test_windowed_patches_are_put_in_order() -> None:
    """Qwen2.5-VL: the encoder's patch order is not the tokens' order, and pooling undoes it."""
    model = build("qwen2_5_vl")
    data = batch("qwen2_5_vl", model, ((3, "image", 4),))
    _, arguments = call(model, data, "image")
    geometry = find_family(model).geometry("image", arguments)
    patches = torch.arange(64.0)
    assert not torch.equal(geometry.pool(patches), patches.view(-1, 4).mean(1))
    assert sorted(geometry.pool(patches).tolist()) == patches.view(-1, 4).mean(1).tolist()


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_tapped_score_is_eager_attention(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same attention, computed by transformers with all its weights."""
    model = build(name)
    data = prompts(batch(name, model, ROWS[kind]))
    with attach(model, PruneConfig("score_probe", keep=0.5)) as pruner:
        model(**data)
        seen = pruner.method.seen
    family = find_family(model)
    attention = family.block_attention(family.blocks[family.feature_block])
    module = sys.modules[type(attention).__module__]
    eager, found = module.eager_attention_forward, []

    def record(block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = eager(block, *args, **kwargs)
        if block is attention:
            found.append(out[1])
        return out

    monkeypatch.setattr(module, "eager_attention_forward", record)
    family.tower.set_attn_implementation("eager")
    _, arguments = call(model, data, kind)
    if family.has_cls:
        patches = [weight[:, :, 0, 1:].mean(1).flatten() for weight in found]
    else:
        patches = [weight.mean((1, 2)).flatten() for weight in found]
    expected = torch.cat(patches)
    if isinstance(family, TokenFamily):
        expected = family.geometry(kind, arguments).pool(expected)
    assert len(seen) == len(expected)
    assert (seen - expected).abs().max() < 1e-5 * expected.max()
    assert seen.std() > 0.02 * seen.mean()
