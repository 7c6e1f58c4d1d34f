"""YOPO with a cache against `tests/yopo.py`, which has none; masks and methods beside it."""

from __future__ import annotations

import pytest
import torch

from itprune import PruneConfig, attach
from tests.models import PATCHES, ROWS, batch, prompts, tiny_llava
from tests.yopo import PROMPT, Plan, attached, decode, reference, rows_of

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


@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=["bool", "float"])
@pytest.mark.parametrize("mode", ["remove", "zero_after_softmax"])
def test_a_mask_of_the_caller_is_respected(mode: str, kind: torch.dtype) -> None:
    """With a mask that is more than causal, windows and gates are put into it."""
    plan, data = Plan(mode), batch(ROWS[:1])
    model, bare = tiny_llava(), tiny_llava()
    attached(model, plan)
    length = data["input_ids"].shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if kind == torch.float32:
        seen = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(kind).min)
    out = model(**{**data, "attention_mask": seen}).logits
    logits, _ = reference(bare, data, plan)
    there = ~logits[..., 0].isnan()
    assert (out[there] - logits[there]).abs().max() < 1e-5


@pytest.mark.parametrize("other", ["topk_cls", "downsample"])
def test_it_combines_with_methods_before_the_llm(other: str) -> None:
    """Training and generation run, and a batch is still its rows."""
    plan, data = Plan(), batch(ROWS[:3:2])
    model = tiny_llava()
    config = PruneConfig(
        f"{other}+yopo",
        keep=0.5,
        options={other: {"keep": 0.5}, "yopo": {**plan.options, "cut": 3}},
    )
    with attach(model, config, prompt=PROMPT):
        together = model(**data).logits
        model(**data).loss.backward()
        mask, ids, pixels = next(rows_of(data))
        alone = model(input_ids=ids[None], pixel_values=pixels).logits[0]
        assert (together[0, mask][-5:] - alone[-5:]).abs().max() < 1e-5
        made = [
            model.generate(**prompts(batch(QUESTIONS[:2], side="left")), use_cache=cache)[:, -3:]
            for cache in (True, False)
        ]
        assert torch.equal(*made)
