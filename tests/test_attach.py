"""Attaching twice, and the order of detaching."""

from __future__ import annotations

import pytest
import torch

from itprune import PruneConfig, attach
from tests.models import batch, prompts, tiny_llava

TRAINED = PruneConfig("quecc", keep=None, options={"kernel": 2})


@pytest.mark.parametrize("second", [TRAINED, PruneConfig()], ids=["trained", "training-free"])
def test_a_second_pruner_is_refused_and_the_first_one_stays(second: PruneConfig) -> None:
    model = tiny_llava()
    with attach(model, TRAINED) as pruner:
        with pytest.raises(ValueError, match="attached already"):
            attach(model, second)
        assert dict(model.named_children())["pruner"] is pruner.method
    assert "pruner" not in dict(model.named_children())


def test_an_old_pruner_takes_away_its_own_parts_only() -> None:
    model = tiny_llava()
    old = attach(model, TRAINED)
    old.detach()
    new = attach(model, TRAINED)
    old.detach()
    assert dict(model.named_children())["pruner"] is new.method


def test_an_idle_pruner_asks_for_no_tokens() -> None:
    model, data = tiny_llava(), prompts(batch())
    data["inputs_embeds"] = model.get_input_embeddings()(data.pop("input_ids"))
    expected = model(**data).logits
    with attach(model, PruneConfig(keep=1.0)) as pruner:
        assert torch.equal(model(**data).logits, expected)
        pruner.set_keep(0.5)
        with pytest.raises(ValueError, match="input_ids"):
            model(**data)


def test_an_attach_that_fails_leaves_no_hook() -> None:
    model = tiny_llava()
    model.get_decoder().config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="eager"):
        attach(model, PruneConfig("yopo", keep=0.5))
    modules = list(model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in modules)


def test_a_forward_that_fails_in_the_tower_leaves_nothing_open() -> None:
    model, data = tiny_llava(), prompts(batch())
    with attach(model, PruneConfig(keep=0.5)) as pruner:
        expected = model(**data).logits
        block = model.model.vision_tower.encoder.layers[0]

        def fail(*args: object) -> None:
            raise RuntimeError("out of memory")

        handle = block.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(**data)
        handle.remove()
        features = torch.randn(1, 5, model.config.vision_config.hidden_size)
        assert model.model.multi_modal_projector(features).shape == (1, 5, 32)
        assert pruner._engine.vision.current is None
        assert torch.equal(model(**data).logits, expected)
