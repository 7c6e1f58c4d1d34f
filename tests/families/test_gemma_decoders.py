"""Gemma 3 and PaliGemma through the engine: two rotary tables, two kinds of masks, prompts read in
both directions, and what scores of a layer make of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itprune import PruneConfig, attach
from tests.family_models import batch, build, prompts
from tests.family_oracle import PROMPT, hashed, rounding
from tests.oracle import drops_of, recorded_rows

GEMMAS = ("gemma3", "paligemma", "paligemma_2")
PALIGEMMAS = GEMMAS[1:]
ONE = ((5, "image", 9),)


def untyped(name: str, model: nn.Module) -> dict[str, Tensor]:
    """One prompt without padding, the way a caller gives it who does not know of token types."""
    data = prompts(batch(name, model, ONE))
    return {"input_ids": data["input_ids"], "pixel_values": data["pixel_values"]}


@contextmanager
def hidden_keys(model: nn.Module, drops: list[Tensor]) -> Iterator[None]:
    """The bare model, layer i blind to drops[i]; a layer that gets no mask sees everything else."""
    causal = model.get_decoder().layers[0].self_attn.is_causal

    def hide(index: int, args: Any, kwargs: dict[str, Any]) -> Any:
        gone, mask, cache = drops[index], kwargs["attention_mask"], kwargs["past_key_values"]
        new = args[0].shape[1]
        length = new + (0 if cache is None else cache.get_seq_length(index))
        if mask is None:
            seen = torch.ones(new, length, dtype=torch.bool)
            mask = (seen.tril(length - new) if causal else seen)[None, None]
        # A cache of a sliding layer holds the last keys only.
        unseen = F.pad(gone, (0, length - gone.shape[1]))[:, None, None, -mask.shape[-1] :]
        shut = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask.masked_fill(unseen, shut)}

    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, index=index: hide(index, args, kwargs), with_kwargs=True
        )
        for index, layer in enumerate(model.get_decoder().layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("stage", ["stage1", "stage2", "both"])
@pytest.mark.parametrize("name", PALIGEMMAS)
def test_prompts_without_token_types(name: str, stage: str, mask: bool) -> None:
    """The host hands its layers no mask then, and means both directions."""
    pruned, reference = build(name), build(name)
    data = untyped(name, reference)
    if mask:
        data["attention_mask"] = torch.ones_like(data["input_ids"])
    with torch.no_grad():
        dense = reference(**data).logits
        with attach(pruned, hashed(stage), prompt=PROMPT), recorded_rows(pruned) as found:
            out = pruned(**data).logits
        drops = drops_of(found)
        with attach(pruned, PruneConfig("itprune", keep=1.0), prompt=PROMPT):
            assert torch.equal(pruned(**data).logits, dense)
        with hidden_keys(reference, drops_or_none(drops, data)):
            expected = reference(**data).logits
    kept = ~drops[-1]
    assert drops[-1].any()
    assert (out[kept] - expected[kept]).abs().max() < rounding(expected)


def drops_or_none(drops: list[Tensor | None], data: dict[str, Tensor]) -> list[Tensor]:
    """Nothing dropped where a layer ran on the host's layout."""
    none = torch.zeros_like(data["input_ids"], dtype=torch.bool)
    return [none if gone is None else gone for gone in drops]


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("stage", ["stage1", "stage2", "both"])
@pytest.mark.parametrize("name", GEMMAS)
def test_answers_on_a_cache(name: str, stage: str, typed: bool) -> None:
    """With the cache in the reference, too: older transformers count generated tokens to the part
    read in both directions once there is none."""
    pruned, reference = build(name), build(name)
    data = prompts(batch(name, reference, ONE)) if typed else untyped(name, reference)
    how = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [290]}
    with attach(pruned, hashed(stage), prompt=PROMPT), recorded_rows(pruned) as found:
        answer = pruned.generate(**data, **how)
    with hidden_keys(reference, drops_or_none(drops_of(found), data)):
        expected = reference.generate(**data, **how)
    assert torch.equal(answer, expected)


@contextmanager
def layer_tables(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects the rotary tables every layer really gets."""
    tables: list[tuple[Tensor, Tensor]] = []

    def note(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tables.append(kwargs["position_embeddings"])

    handles = [
        layer.register_forward_pre_hook(note, with_kwargs=True)
        for layer in model.get_decoder().layers
    ]
    try:
        yield tables
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("stage", ["stage1", "both"])
@pytest.mark.parametrize("name", GEMMAS)
def test_renumbered_tokens_turn_by_their_layers_tables(name: str, stage: str) -> None:
    """Gemma 3 has tables for each kind of layer; PaliGemma counts from 1."""
    model = build(name)
    data, first = untyped(name, model), int(name in PALIGEMMAS)
    text = model.get_decoder()
    with (
        attach(model, hashed(stage, positions="contiguous"), prompt=PROMPT),
        layer_tables(model) as tables,
        recorded_rows(model) as found,
        torch.no_grad(),
    ):
        model(**data)
    assert len(tables) == len(found["rows"]) == 6
    for index, (rows, given) in enumerate(zip(found["rows"], tables, strict=True)):
        ids = first + torch.arange(len(rows.token))[None]
        kind = [text.config.layer_types[index]] if name == "gemma3" else []
        for table, expected in zip(given, text.rotary_emb(torch.zeros(1), ids, *kind), strict=True):
            assert torch.equal(table, expected)


def test_a_renumbered_prompt_is_a_shorter_prompt() -> None:
    """PaliGemma, read in both directions: the bare decoder on the kept tokens alone."""
    model = build("paligemma")
    data = untyped("paligemma", model)
    embeds: list[Tensor] = []
    text = model.get_decoder()
    handle = text.register_forward_pre_hook(
        lambda module, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        with (
            attach(model, hashed("stage1", positions="contiguous"), prompt=PROMPT),
            recorded_rows(model) as found,
        ):
            out = model(**data).logits
        handle.remove()
        token = found["rows"][0].token
        ids = 1 + torch.arange(len(token))[None]
        states = text(inputs_embeds=embeds[0][:, token], position_ids=ids).last_hidden_state
        expected = model.lm_head(states)
    assert len(token) < out.shape[1]
    assert (out[:, token] - expected).abs().max() < rounding(expected)


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm", "itprune", "yopo"])
@pytest.mark.parametrize("name", GEMMAS)
def test_methods_inside_the_decoder(name: str, method: str) -> None:
    """They choose, train and answer; a batch is its rows."""
    model = build(name)
    rows = ((5, "image", 9, "answer"), (3, "image", 4, "answer"))
    options = {"window": None} if method == "yopo" else {}
    if method == "yopo" and model.get_decoder().config._attn_implementation == "eager":
        pytest.skip("refused, as tests/test_family_methods.py shows: it caps attention scores")
    with attach(model, PruneConfig(method, keep=0.5, options=options), prompt=PROMPT) as pruner:
        data = batch(name, model, rows)
        with torch.no_grad():
            whole = model(**data, use_cache=False).logits
            for row in range(2):
                one = batch(name, model, rows, order=[row])
                own = model(**one, use_cache=False).logits[0]
                keep = data["attention_mask"][row].bool()
                alone = whole[row, keep]
                assert (own - alone).abs().max() < rounding(whole)
        report = pruner.report
        assert report is not None
        model.train()(**data).loss.backward()
        gradient = model.get_decoder().layers[0].self_attn.q_proj.weight.grad
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.any()
