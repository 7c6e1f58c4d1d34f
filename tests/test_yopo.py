"""YOPO inside a model against `tests/yopo.py`: forward, training, cost, adapters."""

from __future__ import annotations

import pytest
import torch

from itprune.bench.counting import count_flops
from itprune.families.base import Family, FeedForward
from tests.models import DEPTH, IMAGE, PATCHES, ROWS, batch, prompts, tiny_llava
from tests.yopo import CUT, OPTIONS, Plan, attached, gradients, reference


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", ["remove", "zero_after_softmax"])
@pytest.mark.parametrize("part", OPTIONS)
def test_a_batch_equals_the_reference(part: str, mode: str, side: str, layout: str) -> None:
    plan, data = Plan(mode, **OPTIONS[part]), batch(side=side)
    model, bare = tiny_llava(), tiny_llava()
    attached(model, plan, layout)
    # By itself the host numbers a left-padded row from its padding on.
    positions = (data["attention_mask"].cumsum(1) - 1).clamp(min=0)
    out = model(**data, position_ids=positions, use_cache=layout == "padded")
    logits, loss = reference(bare, data, plan)
    there = ~logits[..., 0].isnan()
    assert (out.logits[there] - logits[there]).abs().max() < 1e-5
    assert abs(out.loss - loss) < 1e-5
    assert int(there.sum()) < int(data["attention_mask"].sum()) or mode != "remove"


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("mode", ["remove", "zero_after_softmax"])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["batch", "one row"])
def test_gradients_equal_the_reference(mode: str, layout: str, rows: tuple) -> None:
    plan, data = Plan(mode), batch(rows)
    model, bare = tiny_llava().train(), tiny_llava().train()
    attached(model, plan, layout)
    model(**data).loss.backward()
    reference(bare, data, plan)[1].backward()
    found, expected = gradients(model), gradients(bare)
    assert found.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name in found:
        assert (found[name] - expected[name]).abs().max() <= 1e-5 * max(largest, 1), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("mode", ["remove", "zero_after_softmax"])
def test_checkpointing_changes_no_gradient(mode: str, layout: str, reentrant: bool) -> None:
    """Two forwards before one backward: nothing of the first may leak into the second."""
    found = []
    for checkpointing in (False, True):
        model = tiny_llava().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        attached(model, Plan(mode), layout)
        text = (ROWS[3],)
        loss = model(**batch(seed=1)).loss + model(**batch(ROWS[:2], seed=2)).loss
        (loss + model(**batch(text, seed=3)).loss).backward()
        found.append(gradients(model))
    plain, checkpointed = found
    for name in plain:
        if "vision_tower" in name:
            continue
        if reentrant:  # sums up a weight's gradients in another order
            torch.testing.assert_close(plain[name], checkpointed[name], atol=1e-6, rtol=1e-5)
        else:
            assert torch.equal(plain[name], checkpointed[name]), name


def test_keep_one_is_the_bare_model_and_detach_restores_it() -> None:
    model, data = tiny_llava(), batch()
    before = model(**data).logits
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    one = attached(model, Plan())
    assert not torch.equal(model(**data).logits, before)
    one.set_keep(1.0)
    assert torch.equal(model(**data).logits, before)
    one.set_keep(0.5)
    assert not torch.equal(model(**data).logits, before)
    one.detach()
    assert torch.equal(model(**data).logits, before)
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert after == hooks


# ---------------------------------------------------------------------------- cost
def test_removed_compute_is_not_counted() -> None:
    data = prompts(batch(((5, "image", 9), (5, "image", 9))))
    spent = {}
    for name, plan in {
        "dense": Plan(window=None, heads=None, ffn_keep=1.0),
        "ffn": Plan(window=None, heads=None),
        "all": Plan(),
    }.items():
        model = tiny_llava()
        with attached(model, plan):
            spent[name] = count_flops(lambda model=model: model(**data))
    bare = tiny_llava()
    spent["bare"] = count_flops(lambda: bare(**data))
    assert spent["all"] < spent["ffn"] < spent["dense"] < spent["bare"]
    config = bare.get_decoder().config
    narrow = 2 * 3 * config.hidden_size * config.intermediate_size * 0.5  # of one token and layer
    assert spent["dense"] - spent["ffn"] == narrow * 2 * PATCHES * CUT


def test_visual_tokens_really_run_narrower() -> None:
    model, data, widths = tiny_llava(), prompts(batch(ROWS[:1])), []
    for layer in model.get_decoder().layers:
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda m, args: widths.append(tuple(args[0].shape[1:]))
        )
    attached(model, Plan())
    model(**data, use_cache=False)
    text = int((data["input_ids"] != IMAGE).sum())
    assert widths == [(text, 64), (PATCHES, 32)] * CUT + [(text, 64)] * (DEPTH - CUT)


# ---------------------------------------------------------------------------- adapters
def test_lora_is_cut_with_its_layer_and_other_layers_fall_back() -> None:
    from peft import LoraConfig, get_peft_model

    targets = "gate_proj|up_proj|down_proj"
    data, plan, found = batch(ROWS[:2]), Plan(), []
    for dora in (False, True):  # DoRA has norms over whole rows: it runs at full width
        torch.manual_seed(3)
        lora = LoraConfig(r=4, target_modules=rf".*layers.*({targets})", use_dora=dora)
        model = get_peft_model(tiny_llava(), lora).train()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        attached(model, plan)
        bare = get_peft_model(tiny_llava(), lora).train()
        bare.load_state_dict(model.state_dict())
        model(**data).loss.backward()
        reference(bare.get_base_model(), data, plan)[1].backward()
        one, other = gradients(model), gradients(bare)
        for name in other:
            assert (one[name] - other[name]).abs().max() < 1e-5, name
        found.append(count_flops(lambda model=model: model(**data)))
    assert found[0] < found[1]


@pytest.mark.parametrize("mode", ["remove", "zero_after_softmax"])
def test_fused_projections_fall_back_and_other_blocks_are_refused(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, plan = batch(ROWS[:2]), Plan(mode)
    model = tiny_llava()
    with attached(model, plan):
        expected = model(**data).logits
    monkeypatch.setattr(
        Family, "feed_forward", lambda self, layer: FeedForward(layer.mlp, (), "down_proj")
    )
    with attached(model, plan):
        assert (model(**data).logits - expected).abs().max() < 1e-6
    monkeypatch.setattr(Family, "feed_forward", lambda self, layer: None)
    with attached(model, plan), pytest.raises(ValueError, match=r"^prune\.ffn_keep: the feed-f"):
        model(**data)
    with attached(model, Plan(mode, ffn_keep=1.0)):
        model(**data)
