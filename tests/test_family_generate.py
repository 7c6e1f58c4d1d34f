"""Oracle 5 for every family: generation on a pruned cache is a cache-free loop over the masked
reference; what a cache cannot hold is refused."""

from __future__ import annotations

from inspect import signature

import pytest
import torch
from torch import Tensor
from transformers import (
    LlavaForConditionalGeneration,
    PaliGemmaForConditionalGeneration,
    StaticCache,
)

from itprune import PruneConfig, attach
from tests.family_configs import IMAGE, VIDEO
from tests.family_models import (
    DEPTH,
    FAMILIES,
    NAMES,
    VIDEO_FAMILIES,
    batch,
    build,
    prompts,
    without_images,
)
from tests.family_oracle import PROMPT, attached, hashed, rounding
from tests.oracle import drops_of, masked, recorded_rows

ENCODES_ONCE = "mm_encoder_outputs" in signature(LlavaForConditionalGeneration.forward).parameters
"""`generate` encodes images before it expands rows to beams."""
QUESTIONS = ((5, "image", 9), (3, "wide", 4), (2, "image", 3, "wide", 6), (12,))
PREFIX_ENDS = "_update_model_kwargs_for_generation" in vars(PaliGemmaForConditionalGeneration)
ONE_EACH = QUESTIONS if ENCODES_ONCE else ((5, "image", 9), (3, "image", 4))
"""Older ones hand beams the wrong pictures where a row has several, or several tiles of one."""
CLIPS = ((5, "video", 4), (3, "video", 2, "video", 6), (7,))
CHOICES = {"hash": hashed(), "stage2": hashed("stage2"), "itprune": PruneConfig(keep=0.3)}
MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
every_family = pytest.mark.parametrize("name", NAMES)
video_family = pytest.mark.parametrize("name", VIDEO_FAMILIES)


def generate(model: torch.nn.Module, data: dict[str, Tensor], **options: object):
    settings = {
        "max_new_tokens": 5,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "suppress_tokens": [IMAGE, VIDEO],  # a loop without a cache would take them for images
    }
    return model.generate(**data, **{**settings, **options})


def loop(name: str, model: torch.nn.Module, data: dict[str, Tensor]) -> tuple[Tensor, list]:
    """The same five tokens and their logits, step by step on ever longer prompts."""
    data, logits = dict(data), []
    later = {"attention_mask": 1, "mm_token_type_ids": 0}
    later["token_type_ids"] = 1 if name.startswith("paligemma") else 0
    for _ in range(5):
        scores = model(**data, use_cache=False).logits[:, -1]
        logits.append(scores)
        said = scores.index_fill(1, torch.tensor([IMAGE, VIDEO]), -torch.inf).argmax(1)
        data["input_ids"] = torch.cat([data["input_ids"], said[:, None]], 1)
        for key in later.keys() & data.keys():
            more = data[key].new_full((len(said), 1), later[key])
            data[key] = torch.cat([data[key], more], 1)
    return data["input_ids"], logits


def assert_same(out, sequences: Tensor, logits: list[Tensor] | tuple[Tensor, ...]) -> None:
    """The same tokens from the same logits."""
    assert torch.equal(out.sequences, sequences)
    for mine, theirs in zip(out.logits, logits, strict=True):
        assert (mine - theirs).abs().max() < rounding(theirs)


def check(name: str, rows: tuple, choice: PruneConfig, beams: int = 1) -> None:
    """Generation of a left-padded batch, and what the cache holds behind it."""
    pruned, bare = build(name), build(name)
    data = prompts(batch(name, bare, rows, "left"))
    pruner = attach(pruned, choice, prompt=PROMPT)
    with recorded_rows(pruned) as found:
        out = generate(pruned, data, num_beams=beams)
    with masked(bare, drops_of(found)), torch.no_grad():
        if beams == 1:
            assert_same(out, *loop(name, bare, data))
        else:
            expected = generate(bare, data, num_beams=beams, use_cache=False)
            assert_same(out, expected.sequences, expected.logits)
    assert not torch.equal(out.logits[0], generate(bare, data, num_beams=beams).logits[0])
    layers, drops = out.past_key_values.layers, pruner.report.drops
    assert len(layers) == DEPTH
    for index, layer in enumerate(layers):
        start = max(start for start in drops if start <= index)
        if start or found["rows"][0] is not None:  # below the first drop the host's own layers
            assert layer.keys.shape[-2] == max(drops[start]) + 4
            assert (layer.entries() - 4)[::beams].tolist() == drops[start][::beams]
    assert out.past_key_values.get_seq_length() == data["input_ids"].shape[1] + 4


@every_family
@pytest.mark.parametrize("choice", CHOICES)
def test_generate_equals_the_masked_reference(name: str, choice: str) -> None:
    check(name, QUESTIONS, CHOICES[choice])


@every_family
def test_beams_equal_the_masked_reference(name: str) -> None:
    if name.startswith("paligemma") and not PREFIX_ENDS:
        pytest.skip("this transformers reads its own answers in both directions without a cache")
    check(name, ONE_EACH, CHOICES["hash"], beams=3)


@video_family
@pytest.mark.parametrize("choice", ["hash", "itprune"])
def test_clips_equal_the_masked_reference(name: str, choice: str) -> None:
    check(name, CLIPS, CHOICES[choice])


@every_family
def test_one_row_needs_no_padding(name: str) -> None:
    check(name, QUESTIONS[:1], CHOICES["hash"])


@every_family
def test_a_second_turn_continues_the_pruned_cache(name: str) -> None:
    pruned, bare = build(name), build(name)
    first = prompts(batch(name, bare, QUESTIONS[:1], "left"))
    attach(pruned, CHOICES["hash"], prompt=PROMPT)
    with recorded_rows(pruned) as found:
        out = generate(pruned, first)
    drops = drops_of(found)
    more = torch.randint(3, 250, (1, 4), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([out.sequences, more], 1)
    again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    old = torch.arange(ids.shape[1])[None] < first["input_ids"].shape[1]
    labels = torch.where(old, -100, ids)  # what stands behind the first prompt is read causally
    again |= FAMILIES[name].types({**again, "labels": labels})
    pixels = {k: v for k, v in first.items() if k not in without_images(first)}
    with masked(bare, drops):
        expected = generate(bare, {**again, **pixels}, use_cache=False)
    second = generate(pruned, again, past_key_values=out.past_key_values)
    assert_same(second, expected.sequences, expected.logits)


@every_family
def test_assisted_decoding_says_the_same(name: str) -> None:
    """Prompt lookup guesses several tokens and takes wrong ones back out of the cache."""
    with attached(name, CHOICES["hash"]) as (model, _):
        data = prompts(batch(name, model, QUESTIONS[:1]))
        data["input_ids"][0, -6:] = torch.tensor([7, 8, 9, 7, 8, 9])
        expected = generate(model, data, max_new_tokens=10)
        found = generate(model, data, max_new_tokens=10, prompt_lookup_num_tokens=3)
    assert torch.equal(found.sequences, expected.sequences)


@every_family
def test_a_static_cache_is_refused(name: str) -> None:
    with attached(name, CHOICES["hash"]) as (model, _):
        data = prompts(batch(name, model, QUESTIONS[:1]))
        cache = StaticCache(model.get_decoder().config, max_cache_len=256)
        with pytest.raises(ValueError, match="dynamic KV cache"):
            model(**data, past_key_values=cache)
        with pytest.raises(ValueError, match="dynamic KV cache"):
            generate(model, data, cache_implementation="static")


@every_family
def test_a_text_only_prompt_is_untouched(name: str) -> None:
    model = build(name)
    data = prompts(batch(name, model, ((12,), (7,)), "left"))
    expected = generate(model, data)
    with attach(model, CHOICES["itprune"], prompt=PROMPT):
        found = generate(model, data)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


@every_family
def test_keep_one_generates_bit_for_bit(name: str) -> None:
    model = build(name)
    data = prompts(batch(name, model, QUESTIONS, "left"))
    expected = generate(model, data)
    with attach(model, PruneConfig(keep=1.0), prompt=PROMPT):
        found = generate(model, data)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


@every_family
@pytest.mark.parametrize("method", ["vtc_cls", "fastv", "cdpruner", "downsample"])
def test_generate_keeps_what_a_forward_keeps(name: str, method: str) -> None:
    """Images are encoded outside of the forward, once for all beams, before the prompt is known:
    the same tokens stay, whatever the method looks at."""
    with attached(name, PruneConfig(method, keep=0.5)) as (model, pruner), torch.no_grad():
        data = prompts(batch(name, model, ONE_EACH[:2], "left"))
        with recorded_rows(model) as rows:
            logits = model(**data).logits[:, -1]
            alone = [row.token.tolist() for row in rows["rows"] if row is not None]
            entries = pruner.report.kv_entries
            out = generate(model, data, max_new_tokens=1)
            assert [row.token.tolist() for row in rows["rows"] if row is not None] == alone
            assert (out.logits[0] - logits).abs().max() < rounding(logits)
            generate(model, data, max_new_tokens=1, num_beams=3)
    assert pruner.report.kv_entries[::3] == entries
    assert alone


@pytest.mark.parametrize("name", MROPE)
def test_positions_are_never_stale(name: str) -> None:
    """Offsets of three-axis positions are kept on the model between calls: training, generation
    and evaluation in turn, on images of other sizes, answer like a fresh model each time."""
    steps = [
        ("train", ((5, "image", 9, "answer"), (3, "wide", 4, "answer"))),
        ("generate", ((3, "wide", 6),)),
        ("eval", ((2, "video", 3, "image", 4, "answer"),)),
        ("generate", ((4, "video", 5), (9,))),
        ("generate", ((8,),)),
        ("eval", ((6, "answer"),)),
        ("generate", ((5, "image", 2, "wide", 7),)),
    ]
    used = build(name)
    attach(used, CHOICES["itprune"], prompt=PROMPT)
    for kind, rows in steps:
        with attached(name, CHOICES["itprune"]) as (fresh, _), torch.no_grad():
            found = []
            for model in (used, fresh):
                data = batch(name, model, rows, "left")
                if kind == "generate":
                    found.append(generate(model.eval(), prompts(data)).logits[-1])
                else:
                    found.append(model.train(kind == "train")(**data).logits)
        assert torch.equal(*found), (kind, rows)
