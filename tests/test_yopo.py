"""YOPO inside a model, against a decoder written out here: dense masks, every channel, no cache."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from itprune import PromptFormat, PruneConfig, attach
from itprune.attach import calibrate
from itprune.bench.counting import count_flops
from itprune.calibration import Calibration
from itprune.host import Host
from itprune.methods import build_method
from tests.models import ASSISTANT, DEPTH, IMAGE, PATCHES, ROWS, batch, prompts, tiny_llava

PROMPT = PromptFormat((0, 1, 2, *ASSISTANT), ASSISTANT)
HEADS, CUT, SIDE = 4, 4, math.isqrt(PATCHES)
SCORES = [[9.0, 9.0, 9.0, 9.0]] * 2 + [
    [0.4, 0.1, 0.3, 0.2],
    [0.1, 0.9, 0.05, 0.35],
    [0.5, 0.01, 0.02, 0.03],
]
"""A calibration of all layers but the last; layers 2 and 3 share two heads:
0.9 and 0.4."""
ACTIVE = {2: [1, 0, 0, 0], 3: [0, 1, 0, 0], 4: [1, 0, 0, 0]}
SHARE = 10 / 16
OPTIONS = {
    "all": {"heads": SHARE},
    "window": {"heads": None, "ffn_keep": 1.0},
    "heads": {"heads": SHARE, "ffn_keep": 1.0, "window": None},
    "ffn": {"heads": None, "window": None},
}


@dataclass
class Plan:
    """What the reference computes."""

    mode: str = "remove"
    window: int | None = 3
    heads: float | None = SHARE
    ffn_keep: float = 0.5

    @property
    def options(self) -> dict[str, object]:
        return {**vars(self), "cut": CUT}


def attached(model: torch.nn.Module, plan: Plan, layout: str = "packed"):
    config = PruneConfig("yopo", keep=None, options=plan.options, layout=layout)
    calibration = Calibration(samples=1, found={"heads": SCORES})
    return attach(model, config, prompt=PROMPT, calibration=calibration)


# ---------------------------------------------------------------------------- reference
def decode(
    model: torch.nn.Module, ids: Tensor, pixels: Tensor | None, plan: Plan, new: int = 0
) -> Tensor:
    """(S, vocabulary) logits of one row without padding; NaN where a token was removed. The last
    `new` tokens were generated and are text, whatever their ids."""
    text = model.get_decoder()
    visual = (ids == IMAGE) & (torch.arange(len(ids)) < len(ids) - new)
    hidden = text.embed_tokens(ids)
    if pixels is not None and visual.any():
        features = torch.cat(list(model.model.get_image_features(pixels).pooler_output))
        hidden = torch.zeros_like(hidden).index_copy(0, visual.nonzero()[:, 0], features) + (
            hidden * ~visual[:, None]
        )
    place = torch.arange(len(ids))
    seen = allowed(visual, plan.window)
    for index, layer in enumerate(text.layers):
        if index == CUT and plan.mode == "remove":
            hidden, place, seen = hidden[~visual], place[~visual], seen[~visual][:, ~visual]
            visual = visual[~visual]
        hidden = hidden + attention(text, layer, index, hidden, place, seen, visual, plan)
        normed = layer.post_attention_layernorm(hidden)
        channels = layer.mlp.act_fn(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
        first = torch.arange(channels.shape[1]) < int(channels.shape[1] * plan.ffn_keep)
        hidden = hidden + layer.mlp.down_proj(channels * (first | ~visual[:, None]))
    logits = model.lm_head(text.norm(hidden))
    return logits.new_full((len(ids), logits.shape[1]), math.nan).index_copy(0, place, logits)


def attention(text, layer, index, hidden, place, seen, visual, plan) -> Tensor:
    module, normed = layer.self_attn, layer.input_layernorm(hidden)
    q, k, v = (
        f(normed).view(1, len(hidden), -1, module.head_dim).transpose(1, 2)
        for f in (module.q_proj, module.k_proj, module.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *text.rotary_emb(hidden[None], place[None]))
    k, v = (t[0].repeat_interleave(HEADS // t.shape[1], 0) for t in (k, v))
    heads = torch.ones(HEADS, dtype=torch.bool)
    if plan.heads is not None and index in ACTIVE:
        heads = torch.tensor(ACTIVE[index]).bool()
    treats = (heads & torch.tensor(index < CUT))[:, None, None] | ~visual
    logits = q[0] @ k.transpose(1, 2) * module.scaling
    if plan.mode == "remove":
        weight = logits.masked_fill(~(seen & treats), -1e30).softmax(-1)
    else:
        weight = logits.masked_fill(~seen, -math.inf).softmax(-1) * treats
    out = weight @ v * (heads[:, None] | ~visual)[..., None]
    return module.o_proj(out.transpose(0, 1).flatten(1))


def allowed(visual: Tensor, window: int | None) -> Tensor:
    """Causal, but inside an image a window in both directions."""
    causal = torch.ones(len(visual), len(visual), dtype=torch.bool).tril()
    if window is None:
        return causal
    number = visual.cumsum(0) - 1
    image = torch.where(visual, number // PATCHES, -1)
    row, column = number % PATCHES // SIDE, number % SIDE
    reach = window // 2
    near = ((row[:, None] - row).abs() <= reach) & ((column[:, None] - column).abs() <= reach)
    inside = (image[:, None] == image) & visual[:, None]
    return torch.where(inside, near, causal)


def rows_of(data: dict[str, Tensor]):
    """(place of the row's tokens, ids, pixels) of each row of a batch."""
    images = 0
    for ids, mask in zip(data["input_ids"], data["attention_mask"].bool(), strict=True):
        count = int((ids == IMAGE).sum()) // PATCHES
        yield mask, ids[mask], data["pixel_values"][images : images + count] if count else None
        images += count


def reference(model: torch.nn.Module, data: dict[str, Tensor], plan: Plan) -> tuple[Tensor, Tensor]:
    """(B, S, vocabulary) logits, NaN where there are none, and the loss."""
    logits = torch.full((*data["input_ids"].shape, model.lm_head.out_features), math.nan)
    total, count = torch.zeros(()), 0
    for index, (mask, ids, pixels) in enumerate(rows_of(data)):
        out = decode(model, ids, pixels, plan)
        logits[index, mask] = out.detach()
        targets = data["labels"][index, mask][1:]
        total = total + F.cross_entropy(
            out[:-1][targets != -100], targets[targets != -100], reduction="sum"
        )
        count += int((targets != -100).sum())
    return logits, total / count


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------------- forward, training
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", ["remove", "zero_after_softmax"])
@pytest.mark.parametrize("part", OPTIONS)
def test_a_batch_equals_the_reference(part: str, mode: str, side: str, layout: str) -> None:
    plan, data = Plan(mode, **OPTIONS[part]), batch(side=side)
    model, bare = tiny_llava(), tiny_llava()
    attached(model, plan, layout)
    out = model(**data, use_cache=layout == "padded")
    logits, loss = reference(bare, data, plan)
    there = ~logits[..., 0].isnan()
    if side == "left":  # the host numbers a left-padded row from its padding on
        positions = (data["attention_mask"].cumsum(1) - 1).clamp(min=0)
        out = model(**data, position_ids=positions, use_cache=layout == "padded")
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


# ---------------------------------------------------------------------------- generate
QUESTIONS = ((5, "image", 9), (3, "image", 4), (2, "image", 3, "image", 6), (12,))


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("mode", ["remove", "zero_after_softmax"])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("rows", [QUESTIONS, QUESTIONS[:1]], ids=["batch", "one row"])
def test_generate_equals_a_loop_without_cache(
    rows: tuple, kv_heads: int, mode: str, layout: str
) -> None:
    plan, data = Plan(mode), prompts(batch(rows, side="left"))
    model, bare = tiny_llava(kv_heads), tiny_llava(kv_heads)
    attached(model, plan, layout)
    out = model.generate(**data, max_new_tokens=6, do_sample=False)
    new = out[:, data["input_ids"].shape[1] :]
    for index, (_, ids, pixels) in enumerate(rows_of(data)):
        for step in range(6):
            with torch.no_grad():
                logits = decode(bare, ids, pixels, plan, step)[-1]
            top = logits.topk(2)
            assert top.values[0] - top.values[1] > 1e-4, "a tie tells nothing"
            assert int(new[index, step]) == int(top.indices[0])
            ids = torch.cat([ids, top.indices[:1]])


@pytest.mark.parametrize("mode", ["remove", "zero_after_softmax"])
def test_beams_equal_beams_without_cache(mode: str) -> None:
    data = prompts(batch(QUESTIONS[:2], side="left"))
    model = tiny_llava()
    attached(model, Plan(mode))
    found = [
        model.generate(**data, num_beams=3, max_new_tokens=5, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("mode", ["remove", "zero_after_softmax"])
def test_a_second_turn_with_its_own_image_continues_the_cache(mode: str) -> None:
    plan, data = Plan(mode), prompts(batch(((3, "image", 4, "image", 5),)))
    ids, pixels = data["input_ids"], data["pixel_values"]
    model, bare = tiny_llava(), tiny_llava()
    attached(model, plan)
    first = 4 + PATCHES + 2
    cache = model(input_ids=ids[:, :first], pixel_values=pixels[:1], use_cache=True)
    out = model(
        input_ids=ids[:, first:],
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels[1:],
        past_key_values=cache.past_key_values,
    )
    expected = decode(bare, ids[0], pixels, plan)[first:]
    there = ~expected[:, 0].isnan()
    assert (out.logits[0, there] - expected[there]).abs().max() < 1e-5


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


# ---------------------------------------------------------------------------- heads, keep, errors
def test_calibration_finds_heads_that_look_at_images() -> None:
    model, data = tiny_llava(), prompts(batch())
    one = attach(model, PruneConfig("yopo", keep=None, options={"cut": CUT}), prompt=PROMPT)
    record = calibrate(one, [data, prompts(batch(ROWS[:1], seed=4))])
    scores = torch.tensor(record.found["heads"])
    assert scores.shape == (DEPTH - 1, HEADS)
    assert record.samples == 4
    # The second highest of four ratios: more than 40 % of the samples are two.
    expected = torch.stack([ratios(model, ids, p, layer=2) for _, ids, p in images_of(data)])
    again = prompts(batch(ROWS[:1], seed=4))
    last = [ratios(model, ids, p, layer=2) for _, ids, p in images_of(again)]
    expected = torch.cat([expected, torch.stack(last)]).sort(0, descending=True).values[1]
    torch.testing.assert_close(scores[2], expected, atol=1e-5, rtol=1e-4)
    active = [one.method.sparsity(layer).heads for layer in range(CUT)]
    assert active[0] is active[1] is None
    assert int(active[2].sum() + active[3].sum()) == round(0.75 * HEADS * CUT) - 2 * HEADS
    assert Calibration.from_dict(record.to_dict()) == record


def images_of(data: dict[str, Tensor]):
    return [row for row in rows_of(data) if row[2] is not None]


def ratios(model: torch.nn.Module, ids: Tensor, pixels: Tensor, layer: int) -> Tensor:
    """(H,) attention of the prompt's last token to visual over text keys, by an eager model."""
    eager = tiny_llava()
    eager.set_attn_implementation("eager")
    end = int((ids == ASSISTANT[1]).nonzero()[0]) + 1  # the first answer is predicted here
    with torch.no_grad():
        weights = eager(
            input_ids=ids[None, :end], pixel_values=pixels, output_attentions=True
        ).attentions[layer][0, :, -1]
    visual = ids[:end] == IMAGE
    return weights[:, visual].sum(1) / weights[:, ~visual].sum(1)


def test_without_calibration_all_heads_stay_and_say_so_once() -> None:
    model, data = tiny_llava(), batch()
    attach(model, PruneConfig("yopo", keep=None), prompt=PROMPT)
    with pytest.warns(UserWarning, match=r"prune\.heads: not calibrated") as seen:
        model(**data)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**data)


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.8])
def test_keep_is_the_layer_average_of_visual_tokens(keep: float) -> None:
    model, data = tiny_llava(), batch(ROWS[:2])
    one = attach(model, PruneConfig("yopo", keep=keep, options={"heads": None}), prompt=PROMPT)
    model(**data)
    cut = one.method.cut
    assert abs(cut / DEPTH - keep) <= 0.5 / DEPTH
    assert [s.visual.tolist() for s in one.report.segments] == [[PATCHES] * 2, [0, 0]]
    assert one.report.segments[-1].start == cut


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"window": 4}, "prune.window: must be odd and positive, got 4"),
        ({"mode": "zero"}, "prune.mode: unknown value 'zero'"),
        ({"heads": 1.5}, "prune.heads: must be a fraction"),
        ({"ffn_keep": 0.0}, "prune.ffn_keep: must be a fraction"),
        ({"cut": 0}, "prune.cut: must be a layer from 1 to 32 of this model, got 0"),
        ({"cut": 33}, "prune.cut: must be a layer from 1 to 32 of this model, got 33"),
    ],
)
def test_bad_options_are_one_sentence(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence.replace(".", r"\.")) as error:
        build_method("yopo", options, Host.example())
    assert "\n" not in str(error.value)


def test_a_keep_below_one_layer_names_the_lowest() -> None:
    method = build_method("yopo", {}, Host.example())
    method.share(0.01)
    with pytest.raises(ValueError, match=r"prune\.keep: 0\.01 .* lowest .* 0\.031"):
        method.layers()
