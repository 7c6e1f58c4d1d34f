"""Oracles 1-4 and 7: keep 1.0 is the bare model, dropping is masking, a batch is its rows,
checkpointing changes nothing, and later layers really see fewer tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from itprune import PromptFormat, PruneConfig, attach
from tests.models import ASSISTANT, DEPTH, ROWS, batch, prompts, tiny_llava
from tests.oracle import drops_of, masked, recorded_rows

PROMPT = PromptFormat((0, 1, 2, *ASSISTANT), ASSISTANT)
HASH = PruneConfig("hash_choice", keep=0.5)
STAGES = {
    "stage1": {"after": ()},
    "stage2": {"image": 1.3},
    "both": {},
}


def config(stage: str = "both", **changes: object) -> PruneConfig:
    return PruneConfig("hash_choice", keep=0.5, options=STAGES[stage], **changes)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    largest = max(g.abs().max() for g in b.values())
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance * max(largest, 1), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_keep_one_is_the_bare_model(side: str) -> None:
    model, data = tiny_llava().train(), batch(side=side)
    bare = model(**data)
    bare.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    attached = attach(model, PruneConfig(keep=1.0), prompt=PROMPT)
    for _ in range(2):  # attached, then detached
        out = model(**data)
        out.loss.backward()
        assert torch.equal(out.logits, bare.logits)
        assert torch.equal(out.loss, bare.loss)
        found = gradients(model)
        assert all(torch.equal(found[n], expected[n]) for n in expected)
        model.zero_grad()
        attached.detach()


def test_detach_restores_the_model_bit_for_bit() -> None:
    model, data = tiny_llava(), batch()
    before = model(**data).logits
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    attention = model.get_decoder().config._attn_implementation
    with attach(model, HASH, prompt=PROMPT):
        assert not torch.equal(model(**data).logits, before)
    assert torch.equal(model(**data).logits, before)
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert after == hooks
    assert model.get_decoder().config._attn_implementation == attention


def test_attaching_twice_is_refused() -> None:
    model = tiny_llava()
    attach(model, HASH)
    with pytest.raises(ValueError, match="attached already"):
        attach(model, HASH)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("stage", STAGES)
def test_dropping_equals_masking(stage: str, side: str, layout: str) -> None:
    data = batch(side=side)
    pruned, reference = tiny_llava(), tiny_llava()
    attach(pruned, config(stage, layout=layout), prompt=PROMPT)
    with recorded_rows(pruned) as found:
        out = pruned(**data, use_cache=layout == "padded")
    drops = drops_of(found)
    assert any(d is not None and d.any() for d in drops)
    with masked(reference, drops):
        expected = reference(**data)
    kept = ~drops[-1] & data["attention_mask"].bool()
    assert (out.logits[kept] - expected.logits[kept]).abs().max() < 1e-5
    assert abs(out.loss - expected.loss) < 1e-6

    pruned.train()(**data).loss.backward()
    with masked(reference.train(), drops):
        reference(**data).loss.backward()
    found_gradients, expected_gradients = gradients(pruned), gradients(reference)
    close(found_gradients, expected_gradients, 1e-5)


def test_the_oracle_notices_a_wrong_drop() -> None:
    data, pruned, reference = batch(), tiny_llava(), tiny_llava()
    attach(pruned, config(), prompt=PROMPT)
    with recorded_rows(pruned) as found:
        out = pruned(**data)
    drops = drops_of(found)
    kept = (~drops[-1] & data["attention_mask"].bool()).nonzero()
    drops[-1][tuple(kept[len(kept) // 2 - 8])] = True
    with masked(reference, drops):
        assert (out.loss - reference(**data).loss).abs() > 1e-5


@pytest.mark.parametrize("method", ["hash_choice", "itprune", "random", "uniform", "topk_cls"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_rows(method: str, side: str) -> None:
    model = tiny_llava()
    attached = attach(model, PruneConfig(method, keep=0.5), prompt=PROMPT)
    data = batch(side=side)
    together, report = model(**data), None
    report = attached.report
    alone, images = [], 0
    for index, row in enumerate(ROWS):
        count = row.count("image")
        length = int(data["attention_mask"][index].sum())
        place = slice(-length, None) if side == "left" else slice(0, length)
        one = {
            "input_ids": data["input_ids"][index : index + 1, place],
            "labels": data["labels"][index : index + 1, place],
            "attention_mask": torch.ones(1, length, dtype=torch.long),
        }
        if side == "left":  # the padded row's positions, so that rotary phases agree
            offset = data["input_ids"].shape[1] - length
            one["position_ids"] = (torch.arange(length) + offset)[None]
        if count:
            one["pixel_values"] = data["pixel_values"][images : images + count]
        images += count
        logits = model(**one).logits[0]
        supervised = one["labels"][0] != -100
        alone.append((together.logits[index, place][supervised] - logits[supervised]).abs().max())
        if count:
            assert attached.report.kv_entries == report.kv_entries[index : index + 1]
    assert max(alone) < 1e-5


def test_permuting_the_batch_permutes_the_result() -> None:
    model = tiny_llava()
    attached = attach(model, PruneConfig(keep=0.4), prompt=PROMPT)
    rows = (ROWS[0], ROWS[1], ROWS[3])
    data = batch(rows)
    first, kept = model(**data).logits, attached.report.tokens_stage1
    order = [2, 1, 0]
    swapped = {k: v[order] for k, v in data.items() if k != "pixel_values"}
    swapped["pixel_values"] = data["pixel_values"][[1, 0]]
    second = model(**swapped).logits
    assert (first[order] - second).abs().max() < 1e-5
    assert attached.report.tokens_stage1 == [kept[i] for i in order]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("method", ["hash_choice", "itprune"])
def test_checkpointing_changes_no_gradient(method: str, layout: str, reentrant: bool) -> None:
    """Two forwards before one backward: nothing of the first may leak into the second."""
    settings = PruneConfig(method, keep=0.5, layout=layout)
    found = []
    for checkpointing in (False, True):
        model = tiny_llava().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        attach(model, settings, prompt=PROMPT)
        loss = model(**batch(seed=1)).loss + model(**batch(ROWS[:2], seed=2)).loss
        loss.backward()
        found.append(gradients(model))
    plain, checkpointed = found
    vision = {n for n in plain if "vision_tower" in n}
    for name in plain.keys() - vision:
        assert torch.equal(plain[name], checkpointed[name]), name


def test_later_layers_really_see_fewer_tokens() -> None:
    model, data, seen = tiny_llava(), batch(), {}
    for index, layer in enumerate(model.get_decoder().layers):
        layer.mlp.register_forward_pre_hook(
            lambda m, args, index=index: seen.update({index: args[0].shape[:2].numel()})
        )
    attached = attach(model, config(), prompt=PROMPT)
    model(**data, use_cache=False)
    report = attached.report
    expected = {}
    for start, tokens in report.drops.items():
        expected.update({i: sum(tokens) for i in range(start, DEPTH)})
    assert seen == expected
    assert len(report.drops) == 3
    assert seen[0] > seen[2] > seen[4]
    entries = [0] * len(ROWS)
    for layer in range(DEPTH):
        tokens = report.drops[max(start for start in report.drops if start <= layer)]
        entries = [n + m for n, m in zip(entries, tokens, strict=True)]
    assert report.kv_entries == entries


def test_train_and_eval_choose_the_same_tokens() -> None:
    model, data = tiny_llava(), batch()
    attached = attach(model, PruneConfig(keep=0.3), prompt=PROMPT)
    with torch.no_grad():
        model.eval()(**prompts(data))
        answering = attached.report.drops
        model.train()(**data)
    # Labels protect answers, which the prompt already contains here as plain text.
    assert attached.report.drops == answering


def test_label_only_logits_give_the_same_loss() -> None:
    data, losses = batch(), {}
    for choice in ("never", "always"):
        model = tiny_llava().train()
        attach(model, config(label_only_logits=choice), prompt=PROMPT)
        out = model(**data, num_items_in_batch=torch.tensor(7))
        losses[choice] = out.loss
        rows = out.logits.shape[0]
    assert abs(losses["never"] - losses["always"]) < 1e-6
    assert rows == int((data["labels"][:, 1:] != -100).sum())


def test_bfloat16_autocast_trains() -> None:
    model, data = tiny_llava().train(), batch()
    attach(model, PruneConfig(keep=0.4), prompt=PROMPT)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**data).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_deepcopy_is_independent() -> None:
    model, data = tiny_llava(), batch()
    attach(model, HASH, prompt=PROMPT)
    expected = model(**data).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**data).logits, expected)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert torch.equal(model(**data).logits, expected)


def test_arguments_may_be_positional() -> None:
    model, data = tiny_llava(), batch()
    attach(model, HASH, prompt=PROMPT)
    named = model(**prompts(data)).logits
    found = model(data["input_ids"], data["pixel_values"], data["attention_mask"]).logits
    assert torch.equal(found, named)


def test_counted_flops_agree_with_the_report() -> None:
    model, data = tiny_llava(), batch()
    attached = attach(model, config(), prompt=PROMPT)
    with FlopCounterMode(display=False, depth=None) as counter:
        model(**data, use_cache=False)
    text, drops = model.get_decoder().config, attached.report.drops
    a_token = 3 * 2 * text.hidden_size * text.intermediate_size  # gate, up and down projection
    for layer in range(DEPTH):
        tokens = sum(drops[max(start for start in drops if start <= layer)])
        name = f"LlavaForConditionalGeneration.model.language_model.layers.{layer}.mlp"
        assert sum(counter.get_flop_counts()[name].values()) == tokens * a_token
