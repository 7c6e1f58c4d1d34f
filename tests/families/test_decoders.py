"""Where the parts of the decoders are: norm, attention, rotary tables, feed-forward channels."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from itprune.families import find_family
from itprune.families.base import Family
from tests.family_models import batch, build, prompts

NAMES = ("internvl", "idefics3", "smolvlm", "gemma3", "paligemma", "paligemma_2")


@pytest.fixture(scope="module", params=NAMES)
def seen(request: pytest.FixtureRequest) -> tuple[Family, dict[tuple[str, int], Any]]:
    """One forward of each model: what its layers, their attention and their blocks were given."""
    model, calls = build(request.param), {}
    family = find_family(model)

    def note(key: tuple[str, int], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        calls[key] = (args, kwargs)

    handles = []
    for index, layer in enumerate(family.layers):
        block = family.feed_forward(layer)
        assert block is not None
        parts = {"layer": layer, "attention": family.attention(layer), "last": block.module}
        parts["last"] = block.module.get_submodule(block.last)
        for kind, module in parts.items():
            hook = functools.partial(note, (kind, index))
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        model(**prompts(batch(request.param, model)))
    for handle in handles:
        handle.remove()
    return family, calls


def test_attention_gets_the_normed_input(seen: tuple[Family, dict]) -> None:
    family, calls = seen
    for index, layer in enumerate(family.layers):
        given: Tensor = calls["layer", index][0][0]
        assert torch.equal(
            family.input_norm(layer)(given), calls["attention", index][1]["hidden_states"]
        )


def test_rotary_tables_are_the_hosts(seen: tuple[Family, dict]) -> None:
    family, calls = seen
    for index in range(len(family.layers)):
        (hidden, *_), kwargs = calls["layer", index]
        own = family.rotary(hidden, kwargs["position_ids"], index)
        for table, host in zip(own, kwargs["position_embeddings"], strict=True):
            assert torch.equal(table, host)


def test_channels_are_made_by_the_named_projections(seen: tuple[Family, dict]) -> None:
    family, calls = seen
    for index, layer in enumerate(family.layers):
        block = family.feed_forward(layer)
        assert block is not None
        assert block.first == ("gate_proj", "up_proj")
        assert calls["last", index][0][0].shape[-1] == 64


def test_the_decoder_is_the_one_that_owns_the_layers(seen: tuple[Family, dict]) -> None:
    family, _ = seen
    assert family.placeholders == {"image": 290}
    assert len(family.layers) == 6
    assert family.text_model.layers is family.layers
    assert family.host.width == 32
    assert family.host.vision_heads == 4
    assert all(isinstance(part, nn.Module) for part in family.projectors)
