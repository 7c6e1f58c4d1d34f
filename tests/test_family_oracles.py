"""The design's oracles 1-4 and 7 for every family: keep 1.0 is the bare model, dropping is masking,
a batch is its rows, checkpointing changes nothing, and later layers really see fewer tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from itprune import PruneConfig, attach
from itprune.families import families
from tests.family_models import NAMES, batch, build, prompts
from tests.family_oracle import (
    PROMPT,
    STAGES,
    assert_close,
    attached,
    computed,
    counted_rows,
    gradients,
    hashed,
    rounding,
    rows_of,
    visual_counts,
)
from tests.oracle import drops_of, masked, recorded_rows

RUNS = [
    *((stage, "right", "packed") for stage in STAGES),
    *((stage, "left", "padded") for stage in STAGES),
    ("both", "left", "packed"),
    ("both", "right", "padded"),
]
"""Stage, padding and layout."""
HOOKS_ARE_CHECKPOINTED = "__call__" in vars(GradientCheckpointingLayer)
"""Older transformers recompute a layer with its hooks."""
every_family = pytest.mark.parametrize("name", NAMES)


def test_every_family_is_tried() -> None:
    """A family registered in the package has a tiny model here (smolvlm shares a file)."""
    tried = {build(name).config.model_type for name in NAMES}
    packaged = {"llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"}
    packaged |= {"internvl", "idefics3", "smolvlm", "gemma3", "paligemma"}
    assert tried == packaged
    assert packaged <= set(families())


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_keep_one_is_the_bare_model(name: str, side: str) -> None:
    model = build(name).train()
    data = batch(name, model, rows_of(name), side)
    bare = model(**data)
    bare.loss.backward()
    expected = gradients(model)
    pruner = attach(model, PruneConfig(keep=1.0), prompt=PROMPT)
    for _ in range(2):  # attached, then detached
        model.zero_grad()
        out = model(**data)
        out.loss.backward()
        assert torch.equal(out.logits, bare.logits)
        assert torch.equal(out.loss, bare.loss)
        found = gradients(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], expected[n]) for n in expected)
        pruner.detach()


@every_family
def test_detach_restores_the_model_bit_for_bit(name: str) -> None:
    model = build(name)
    data = batch(name, model, rows_of(name))

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = model(**data).logits
    count, attributes = hooks(), set(model.model.__dict__)
    kernels = [m.config._attn_implementation for m in (model, model.get_decoder())]
    with attach(model, hashed(), prompt=PROMPT):
        assert not torch.equal(model(**data).logits, before)
        with pytest.raises(ValueError, match="attached already"):
            attach(model, hashed())
    assert torch.equal(model(**data).logits, before)
    assert hooks() == count
    assert set(model.model.__dict__) == attributes
    assert "get_image_features" not in vars(model.model)
    assert [m.config._attn_implementation for m in (model, model.get_decoder())] == kernels


@every_family
@pytest.mark.parametrize(("stage", "side", "layout"), RUNS)
def test_dropping_equals_masking(name: str, stage: str, side: str, layout: str) -> None:
    """Original positions; rows with several images, with clips and with text alone."""
    pruned, reference = build(name), build(name)
    data = batch(name, reference, rows_of(name), side)
    attach(pruned, hashed(stage, layout=layout), prompt=PROMPT)
    with recorded_rows(pruned) as found, torch.no_grad():
        out = pruned(**data, use_cache=layout == "padded")
    drops = drops_of(found)
    assert any(gone is not None and gone.any() for gone in drops)
    kept = ~drops[-1] & data["attention_mask"].bool()
    with masked(reference.train(), drops):
        expected = reference(**data)
        expected.loss.backward()
    assert (out.logits[kept] - expected.logits[kept]).abs().max() < rounding(expected.logits)
    assert abs(out.loss - expected.loss) < rounding(expected.logits)
    pruned.train()(**data).loss.backward()
    assert_close(gradients(pruned), gradients(reference))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_the_oracle_notices_a_wrong_drop(name: str) -> None:
    pruned, reference = build(name), build(name)
    data = batch(name, reference, rows_of(name))
    attach(pruned, hashed(), prompt=PROMPT)
    with recorded_rows(pruned) as found:
        out = pruned(**data)
    drops = drops_of(found)
    kept = (~drops[-1] & data["attention_mask"].bool()).nonzero()
    drops[-1][tuple(kept[len(kept) // 2 - 8])] = True
    with masked(reference, drops):
        assert (out.loss - reference(**data).loss).abs() > rounding(out.logits)


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", ["hash_choice", "itprune"])
def test_a_batch_is_its_rows(name: str, method: str, side: str) -> None:
    with attached(name, PruneConfig(method, keep=0.4)) as (model, pruner), torch.no_grad():
        rows = rows_of(name)
        data = batch(name, model, rows, side)
        together = model(**data).logits
        entries = pruner.report.kv_entries
        for index in range(len(rows)):
            one = batch(name, model, rows, side, order=(index,))
            alone = model(**one).logits[0]
            length = len(alone)
            place = slice(-length, None) if side == "left" else slice(0, length)
            spoken = one["labels"][0] != -100
            apart = together[index, place][spoken] - alone[spoken]
            assert apart.abs().max() < 2 * rounding(together)  # rotary phases differ, too
            if visual_counts(one)[0]:
                assert pruner.report.kv_entries == [entries[index]]


@every_family
def test_permuting_the_batch_permutes_the_result(name: str) -> None:
    with attached(name, PruneConfig(keep=0.4)) as (model, pruner), torch.no_grad():
        rows = rows_of(name)
        order = [*range(1, len(rows)), 0]
        first = model(**batch(name, model, rows))
        kept = pruner.report.kv_entries
        second = model(**batch(name, model, rows, order=order))
    assert pruner.report.kv_entries == [kept[row] for row in order]
    data = batch(name, model, rows, order=order)
    spoken = data["labels"] != -100
    apart = first.logits[order][spoken] - second.logits[spoken]
    assert apart.abs().max() < rounding(first.logits)


@every_family
@pytest.mark.parametrize(
    ("method", "reentrant"), [("hash_choice", False), ("hash_choice", True), ("itprune", False)]
)
def test_checkpointing_changes_no_gradient(name: str, method: str, reentrant: bool) -> None:
    """Two forwards before one backward: nothing of the first may leak into the second."""
    if name == "qwen3_vl" and reentrant and HOOKS_ARE_CHECKPOINTED:
        pytest.skip("there DeepStack needs use_reentrant=False, which is the default")
    found = []
    for checkpointing in (False, True):
        with attached(name, PruneConfig(method, keep=0.5), train=True) as (model, _):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
            rows = rows_of(name)
            first = batch(name, model, rows, seed=1)
            second = batch(name, model, rows, "left", seed=2, order=(1, 2))
            (model(**first).loss + model(**second).loss).backward()
            found.append(gradients(model))
    plain, again = found
    tower = {n for n in plain if "vision" in n or "visual" in n}
    assert {n for n in plain if n not in tower} == {n for n in again if n not in tower}
    for key in plain.keys() - tower:
        assert torch.equal(plain[key], again[key]), key
    if not reentrant:
        assert plain.keys() == again.keys()
        for key in tower:
            assert torch.equal(plain[key], again[key]), key


@every_family
def test_training_and_inference_choose_the_same(name: str) -> None:
    with attached(name, PruneConfig(keep=0.3)) as (model, _), torch.no_grad():
        data = batch(name, model, rows_of(name))
        with recorded_rows(model) as rows:
            model.eval()(**data)
            first = [r.token.tolist() for r in rows["rows"]]
            model.train()(**data)
            assert [r.token.tolist() for r in rows["rows"]] == first


@every_family
def test_answers_choose_nothing(name: str) -> None:
    """What a training sample keeps does not depend on what it is to say."""
    with attached(name, PruneConfig(keep=0.3)) as (model, _), torch.no_grad():
        data = batch(name, model, rows_of(name))
        spoken = data["labels"] != -100
        other = torch.where(spoken, (data["input_ids"] + 37) % 240 + 3, data["input_ids"])
        with recorded_rows(model) as rows:
            model(**data)
            first = [r.token.tolist() for r in rows["rows"]]
            model(**{**data, "input_ids": other})
            assert [r.token.tolist() for r in rows["rows"]] == first


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_later_layers_really_see_fewer_tokens(name: str, side: str) -> None:
    with attached(name, hashed()) as (model, pruner), counted_rows(model) as counts:
        data = batch(name, model, rows_of(name), side)
        model(**data, use_cache=False)
        report = pruner.report
    assert counts == computed(name, report.drops)
    assert counts[0] > counts[2] > counts[4]
    assert counts[0] < data["input_ids"].numel()
    assert sum(report.drops[0]) < int(data["attention_mask"].sum())
    assert report.tokens_in == data["attention_mask"].sum(1).tolist()
    assert sum(report.kv_entries) <= sum(counts)


@every_family
def test_a_batch_of_text_alone_is_untouched(name: str) -> None:
    model = build(name).train()
    data = batch(name, model, ((9, "answer"), (4, "answer")))
    expected = model(**data)
    with attach(model, PruneConfig(keep=0.3), prompt=PROMPT):
        found = model(**data)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.loss, expected.loss)


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_packed_batches_of_text_learn_the_same(name: str, side: str, layout: str) -> None:
    """`packs_text`: no layer computes padding, and loss and gradients are the host's."""
    rows = ((9, "answer"), (23, "answer"), (4, "answer"))
    plain, packing = build(name).train(), build(name).train()
    data = batch(name, plain, rows, side)
    expected = plain(**data).loss
    expected.backward()
    with attach(packing, PruneConfig(keep=0.3, layout=layout), prompt=PROMPT) as pruner:
        pruner.packs_text = True
        with counted_rows(packing) as counts:
            found = packing(**data)
        found.loss.backward()
        assert found.logits.shape[0] == int((data["labels"][:, 1:] != -100).sum())
        if pruner.packs:
            assert set(counts) == {int(data["attention_mask"].sum())}
        assert pruner.report is None
        packing.eval()
        assert torch.equal(packing(**data).logits, plain.eval()(**data).logits)
    assert abs(found.loss - expected) < rounding(expected)
    assert_close(gradients(packing), gradients(plain))


@every_family
def test_label_only_logits_give_the_same_loss(name: str) -> None:
    losses = {}
    for choice in ("never", "always"):
        with attached(name, hashed(label_only_logits=choice), train=True) as (model, _):
            data = batch(name, model, rows_of(name))
            out = model(**data, num_items_in_batch=torch.tensor(7))
            losses[choice] = out.loss
    assert abs(losses["never"] - losses["always"]) < rounding(out.logits)
    assert out.logits.shape[0] == int((data["labels"][:, 1:] != -100).sum())


@every_family
def test_a_copy_is_independent(name: str) -> None:
    with attached(name, hashed()) as (model, _), torch.no_grad():
        data = prompts(batch(name, model, rows_of(name)))
        expected = model(**data).logits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**data).logits, expected)
        twin.get_output_embeddings().weight.zero_()
        assert torch.equal(model(**data).logits, expected)


@every_family
def test_bfloat16_autocast_trains(name: str) -> None:
    with attached(name, PruneConfig(keep=0.4), train=True) as (model, _):
        data = batch(name, model, rows_of(name))
        with torch.autocast("cpu", torch.bfloat16):
            if not _runs(name, data):
                pytest.skip("the bare model does not run under autocast here")
            loss = model(**data).loss
        loss.backward()
    assert torch.isfinite(loss)
    assert all(g.isfinite().all() for g in gradients(model).values())


def _runs(name: str, data: dict[str, torch.Tensor]) -> bool:
    try:
        build(name)(**data)
    except RuntimeError:
        return False
    return True
