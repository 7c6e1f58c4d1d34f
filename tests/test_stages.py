"""What the stages choose: scores against the host's own eager attention, counts, text, turns."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from itprune import Calibration, Draw, PromptFormat, PruneConfig, attach, calibrate
from itprune.calibration import Curve
from itprune.engine.relevance import unrotate
from tests.models import ASSISTANT, DEPTH, IMAGE, PATCHES, ROWS, batch, prompts, tiny_llava
from tests.oracle import recorded_rows

PROMPT = PromptFormat((0, 1, 2, *ASSISTANT), ASSISTANT)
LONG = ((5, "image", 40, "answer"), (3, "image", 30, "answer", 6, "answer"))


def probe(model: torch.nn.Module, name: str, store: dict) -> None:
    """Keeps what the method is handed at stage 1 or 2."""
    method = model.itprune_probe
    inner = getattr(method, name)

    def spy(tokens):
        store[name] = tokens
        answer = inner(tokens)
        store[name + "_answer"] = answer
        if name == "after_layer":
            store["relevance"] = {rope: tokens.relevance(rope) for rope in (False, True)}
        else:
            store["salience"] = {
                k: tokens.salience(k) for k in ("attention", "cosine", "full_width")
            }
        return answer

    setattr(method, name, spy)


def spied(config: PruneConfig, data: dict) -> tuple[torch.nn.Module, dict]:
    model, store = tiny_llava(), {}
    attached = attach(model, config, prompt=PROMPT)
    model.itprune_probe = attached.method
    for name in ("before_llm", "after_layer"):
        probe(model, name, store)
    with recorded_rows(model) as found:
        model(**prompts(data))
    store["report"], store["rows"] = attached.report, found.get("rows")
    return model, store


def test_vision_scores_equal_the_eager_towers() -> None:
    data = batch()
    _, store = spied(PruneConfig(keep=0.5), data)
    eager = tiny_llava()
    eager.set_attn_implementation("eager")
    tower = eager.model.vision_tower
    out = tower(data["pixel_values"], output_attentions=True, output_hidden_states=True)
    attention = out.attentions[-2][:, :, 0, 1:].mean(1)  # the block behind hidden_states[-2]
    assert (store["salience"]["attention"].view_as(attention) - attention).abs().max() < 1e-6
    hidden = torch.nn.functional.normalize(out.hidden_states[-2], dim=-1)
    cosine = (hidden[:, 1:] @ hidden[:, :1].transpose(1, 2))[..., 0]
    assert (store["salience"]["cosine"].view_as(cosine) - cosine).abs().max() < 1e-6
    block = tower.encoder.layers[-2]
    normed = block.layer_norm1(out.hidden_states[-3])
    q, k = block.self_attn.q_proj(normed), block.self_attn.k_proj(normed)
    full = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1)[:, 0, 1:]
    assert (store["salience"]["full_width"].view_as(full) - full).abs().max() < 1e-6


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("stage1", [None, {}])
def test_relevance_equals_the_eager_attention(stage1: dict | None, layout: str) -> None:
    """With the rotary phase kept; one sample, so the eager map is easy to read."""
    data = batch(LONG[:1])
    options = {"stage1": stage1, "stage2": {"layers": [1]}}
    _, store = spied(PruneConfig(keep=0.5, layout=layout, options=options), data)
    tokens, rows = store["after_layer"], store["rows"]
    eager = tiny_llava()
    eager.set_attn_implementation("eager")
    kept = torch.arange(data["input_ids"].shape[1]) if stage1 is None else rows[0].token
    hidden = torch.ones_like(data["input_ids"], dtype=torch.bool)
    hidden[0, kept] = False
    handles = [
        layer.register_forward_pre_hook(
            lambda m, args, kw: (
                args,
                {
                    **kw,
                    "attention_mask": kw["attention_mask"].masked_fill(
                        hidden[:, None, None], torch.finfo(torch.float32).min
                    ),
                },
            ),
            with_kwargs=True,
        )
        for layer in eager.get_decoder().layers
    ]
    attention = eager(**prompts(data), output_attentions=True).attentions[1].mean(1)[0]
    for handle in handles:
        handle.remove()
    ids = data["input_ids"][0]
    prefix = (ids[:-1] == ASSISTANT[0]).nonzero()[0, 0] + 2
    first = (ids == IMAGE).nonzero()[0, 0]
    place = torch.arange(len(ids))
    asks = (ids != IMAGE) & (place > first) & (place < prefix)
    sees = place[None, :] <= place[asks][:, None]
    expected = (attention[asks] * sees).sum(0) / sees.sum(0).clamp(min=1)
    assert (store["relevance"][True] - expected[kept]).abs().max() < 1e-6
    assert not torch.allclose(store["relevance"][False], store["relevance"][True])
    assert tokens.visual.sum() == (ids[kept] == IMAGE).sum()


def test_unrotate_is_the_inverse() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model, x = tiny_llava(), torch.randn(2, 4, 7, 8)
    positions = torch.arange(7)[None].expand(2, -1) * 3
    cos, sin = model.get_decoder().rotary_emb(x, positions)
    q, k = apply_rotary_pos_emb(x, x, cos, sin)
    assert (unrotate(q, cos, sin) - x).abs().max() < 1e-5
    assert (unrotate(k * 1.0, cos, sin) - x).abs().max() < 1e-5
    # Scaled tables (YaRN) are divided out, too.
    scaled, _ = apply_rotary_pos_emb(x, x, cos * 1.2, sin * 1.2)
    assert (unrotate(scaled, cos * 1.2, sin * 1.2) - x).abs().max() < 1e-5


def test_a_later_turn_decides_nothing() -> None:
    """Changing the second question and its answer changes no choice about the first."""
    data = batch(((3, "image", 30, "answer", 12, "answer"),))
    changed = {**data, "input_ids": data["input_ids"].clone()}
    changed["input_ids"][0, -16:] = torch.randint(3, 250, (16,))
    changed["input_ids"][0, -5:-3] = torch.tensor(ASSISTANT)
    kept = []
    for one in (data, changed):
        _, store = spied(PruneConfig(keep=0.4), one)
        kept.append([r.token.tolist() for r in store["rows"]])
    assert kept[0] == kept[1]
    assert len(kept[0][-1]) < len(kept[0][0])


def test_text_goes_only_from_long_instructions_and_never_the_protected() -> None:
    data = batch(LONG)
    _model, store = spied(PruneConfig(keep=0.4, options={"stage2": {"min_text": 35}}), data)
    last, ids = store["rows"][-1], data["input_ids"]
    gone = torch.ones_like(ids, dtype=torch.bool).reshape(-1)
    gone[last.token] = False
    gone = gone.view_as(ids) & data["attention_mask"].bool() & (ids != IMAGE)
    assert gone[0].any()
    assert not gone[1].any()  # 30 < 35
    protected = torch.isin(ids, torch.tensor(PROMPT.protected_ids))
    assert not (gone & protected).any()
    assert not (gone & (data["labels"] != -100)).any()
    _, short = spied(PruneConfig(keep=0.4, options={"stage2": {"text": False}}), data)
    text = (data["attention_mask"].bool() & (ids != IMAGE)).sum(1)
    kept_text = short["rows"][-1].lens - short["report"].segments[-1].visual
    assert kept_text.tolist() == text.tolist()


def test_merge_rest_adds_one_weighted_mean() -> None:
    data = batch(ROWS[:1])
    _, store = spied(PruneConfig(keep=0.5, options={"stage2": None}), data)
    _, merged = spied(
        PruneConfig(keep=0.5, options={"stage2": None, "stage1": {"merge_rest": True}}), data
    )
    plain, more = store["before_llm_answer"].keep, merged["before_llm_answer"]
    extra = more.keep & ~plain
    assert int(extra.sum()) == 1
    score, features = store["salience"]["attention"], store["before_llm"].features
    rest = ~plain
    expected = (features[rest] * score[rest, None]).sum(0) / score[rest].sum()
    assert (more.features[extra][0] - expected).abs().max() < 1e-5
    assert torch.equal(more.features[plain], features[plain])


@pytest.mark.parametrize("rule", ["mean", "chord", "iqr", "derivative"])
@pytest.mark.parametrize("score", ["attention", "cosine", "full_width"])
def test_calibration_meets_the_target(rule: str, score: str) -> None:
    model = tiny_llava()
    options = {"stage1": {"rule": rule, "score": score}, "stage2": {"rule": "mean"}}
    attached = attach(model, PruneConfig(keep=0.3, options=options), prompt=PROMPT)
    batches = [prompts(batch(ROWS, seed=s)) for s in range(12)]
    found = calibrate(attached, batches)
    assert found.samples == 36  # rows with images, however many each has
    assert attached.calibration is found
    attached.totals.reset()
    with torch.no_grad():
        for one in batches:
            model(**one)
    totals = attached.totals
    average = totals.visual_layer_tokens / (totals.visual_in * DEPTH)
    # Whole tokens of 36 and the at-least-one rule leave a rounding error.
    assert average == pytest.approx(0.3, abs=0.03)
    assert Calibration.from_dict(found.to_dict()) == found


def test_a_list_is_calibrated_at_each_of_its_budgets() -> None:
    model = tiny_llava()
    budgets = (1.0, 0.15, 0.3, 0.6)
    options = {"stage1": {"rule": "mean"}, "stage2": {"rule": "mean"}}
    attached = attach(model, PruneConfig(keep=Draw(budgets), options=options), prompt=PROMPT)
    batches = [prompts(batch(ROWS, seed=s)) for s in range(12)]
    found = calibrate(attached, batches)
    (later,) = {stage.partition("@")[0] for stage in found.curves} - {"stage1"}
    assert set(found.curves) == {"stage1", later} | {f"{later}@{keep}" for keep in budgets[1:]}
    assert attached.keep == 1.0  # as before
    assert Calibration.from_dict(found.to_dict()) == found
    for keep in (*budgets[1:], 0.45):
        with torch.no_grad(), attached.aside(keep):
            for one in batches:
                model(**one)
            totals = attached.totals
            average = totals.visual_layer_tokens / (totals.visual_in * DEPTH)
        assert average == pytest.approx(keep, abs=0.03)
    assert attached.totals.samples == 0


def test_between_two_measured_budgets_the_scale_lies_between_theirs() -> None:
    few, many = Curve((0.2,), (1.0,)), Curve((0.4,), (1.0,))
    curves = {"stage2.1": few, "stage2.1@0.2": few, "stage2.1@0.6": many}
    found = Calibration(curves, {"stage2.1": "mean"})
    scales = [found.scale("stage2.1", "mean", 0.2, keep) for keep in (None, 0.1, 0.2, 0.4, 0.6, 1)]
    assert scales == pytest.approx([1.0, 1.0, 1.0, 0.75, 0.5, 0.5], abs=1e-6)
    broken = found.to_dict()
    broken["curves"]["stage2.1@much"] = broken["curves"].pop("stage2.1@0.6")
    with pytest.raises(ValueError, match="not a calibration record"):
        Calibration.from_dict(broken)


def test_a_calibration_serves_every_budget() -> None:
    curve = Curve((0.1, 0.2, 0.4), (1.0, 1.0, 2.0))
    for target in (0.05, 0.22, 0.5, 0.9, 1.0):
        scale = curve.scale(target)
        mean = sum(w * min(1, scale * f) for f, w in zip(curve.fraction, curve.weight, strict=True))
        assert mean / 4 == pytest.approx(target, abs=1e-6)


def test_controls_keep_exactly_what_they_are_asked() -> None:
    data = batch()
    kept = {}
    for method in ("random", "uniform", "topk_cls"):
        _, store = spied(PruneConfig(method, keep=0.25), data)
        kept[method] = store["before_llm_answer"].keep.view(-1, PATCHES)
        assert (kept[method].sum(1) == 9).all()
    assert not torch.equal(kept["random"][0], kept["random"][1])
    assert torch.equal(kept["uniform"][0], kept["uniform"][1])
    _, again = spied(PruneConfig("random", keep=0.25, options={"seed": 1}), data)
    assert not torch.equal(again["before_llm_answer"].keep.view(-1, PATCHES), kept["random"])


def test_peft_trains_only_its_parts_on_kept_tokens() -> None:
    model = get_peft_model(
        tiny_llava(),
        LoraConfig(
            r=4,
            target_modules=r".*language_model.*\.(q_proj|v_proj)",
            modules_to_save=["multi_modal_projector"],
        ),
    ).train()
    attached = attach(model, PruneConfig(keep=0.3), prompt=PROMPT)
    model(**batch()).loss.backward()
    assert attached.report.tokens_stage1 < attached.report.tokens_in
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum()}
    assert any("lora_B" in n for n in moved)
    assert any("modules_to_save" in n for n in moved)
    assert not any("vision_tower" in n for n in moved)
    attached.detach()


def test_an_unknown_family_and_attention_are_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    sentence = r"'llama' is not supported; supported: .*llava.*add-a-family"
    with pytest.raises(ValueError, match=sentence):
        attach(LlamaForCausalLM(small))
    model = tiny_llava()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="'eager' is not supported"):
        attach(model)
    assert not model._forward_pre_hooks
    with pytest.raises(ValueError, match="transformers or PEFT model"):
        attach(torch.nn.Linear(2, 2))


def test_pixels_without_token_ids_are_refused() -> None:
    model, data = tiny_llava(), batch(ROWS[:1])
    attach(model, PruneConfig(keep=0.5))
    embeds = model.get_input_embeddings()(data["input_ids"])
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=embeds, pixel_values=data["pixel_values"])


def test_a_trace_shows_what_was_chosen() -> None:
    model, data = tiny_llava(), batch()
    attached = attach(model, PruneConfig(keep=0.4), prompt=PROMPT)
    with attached.tracing() as trace:
        model(**prompts(data))
    assert trace.lens.tolist() == [PATCHES] * 4
    assert len(trace.score) == len(trace.keep) == 4 * PATCHES
    report = attached.report
    assert {k: v.sum(1).tolist() for k, v in trace.alive.items()} == report.drops
    assert torch.equal(trace.alive[0][trace.visual], trace.keep)
    before = trace.keep
    model(**prompts(batch(ROWS[:1])))
    assert trace.keep is before
