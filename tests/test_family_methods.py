"""Every method in every family: what works drops tokens for real and exactly, what does not is
refused with a sentence when it is attached."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from itprune import PruneConfig, attach, methods
from itprune.methods import method_class
from tests.family_models import BEGIN, END, NAMES, VIDEO_FAMILIES, batch, build, prompts
from tests.family_oracle import (
    PROMPT,
    attached,
    computed,
    counted_rows,
    masked_text,
    rounding,
    rows_of,
    text_calls,
    visual_counts,
)
from tests.oracle import drops_of, recorded_rows

MUST_WORK = {"itprune", "topk_cls", "vtc_cls", "fastv", "pyramiddrop", "random", "uniform"}
MUST_WORK |= {"downsample"}
PATCHES = "it reads the encoder's patches one by one, and a token of this family is not one"
PATCH_METHODS = {"prumerge", "prumerge_plus", "visionzip", "aim", "quecc", "vistog"}
ANY_SIZE = ("llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Images differ in size, so that counts alone do not tell a token's neighbours."""
TOKEN_FAMILIES = tuple(name for name in NAMES if name != "llava")
MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

METHODS = [
    name
    for name in methods()
    if method_class(name).__module__.startswith("itprune.") and name != "dense"
]
DOES_NOT_APPLY = {
    (name, method): PATCHES for name in TOKEN_FAMILIES for method in sorted(PATCH_METHODS)
}
CAPPED = "its decoder caps attention scores, so that only its own kernel can attend"
if build("paligemma_2").get_decoder().config._attn_implementation == "eager":
    DOES_NOT_APPLY["paligemma_2", "yopo"] = CAPPED  # older transformers leave the cap out
NOT_MASKING = {
    "sparsevlm": "dropped tokens go on inside kept ones, so later inputs differ",
    "yopo": "windows and head gates are no key mask; tests/test_yopo.py has its own oracle",
}
OPTIONS: dict[str, dict[str, object]] = {
    "quecc": {"kernel": 2},
    "dyvte": {"exit_layer": 2},
    "gsearch": {"schedule": [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]},
}
FREE = {"quecc", "dyvte", "gsearch", "itprune", "prumerge", "prumerge_plus"}
"""Methods whose own rule is tried, without a target."""

WORKS = [
    (name, method)
    for name in NAMES
    for method in METHODS
    if (name, method) not in DOES_NOT_APPLY and name != "llava"
]
"""LLaVA-1.5 has tests/test_method_oracles.py."""


def config(name: str, method: str, **changes: object) -> PruneConfig:
    options = dict(OPTIONS.get(method, {}))
    if method == "yopo" and name in ANY_SIZE:
        options["window"] = None
    keep = None if method in FREE else 0.5
    return PruneConfig(method, keep=keep, options=options).replace(**changes)


def test_the_matrix_is_whole() -> None:
    """What the project promises for every family is not in the table of exceptions."""
    assert not {(n, m) for n, m in DOES_NOT_APPLY if m in MUST_WORK}
    assert {m for _, m in DOES_NOT_APPLY} <= set(METHODS)
    assert len(WORKS) + len(DOES_NOT_APPLY) == len(TOKEN_FAMILIES) * len(METHODS)


@pytest.mark.parametrize(
    ("name", "method"), [case for case, why in DOES_NOT_APPLY.items() if why == PATCHES]
)
def test_methods_that_need_patches_are_refused(name: str, method: str) -> None:
    model = build(name)
    before = dict(model.model.__dict__)
    with pytest.raises(ValueError, match="patches one by one") as refusal:
        attach(model, config(name, method), prompt=PROMPT)
    sentence = str(refusal.value)
    assert sentence.startswith(f"prune.method: {method}")
    assert model.config.model_type in sentence
    offered = sentence.rpartition(": ")[2].split(", ")
    assert not PATCH_METHODS.intersection(offered)
    assert dict(model.model.__dict__) == before
    attach(model, PruneConfig(keep=0.5)).detach()  # nothing was left behind


@pytest.mark.parametrize(
    ("name", "method"), [case for case, why in DOES_NOT_APPLY.items() if why == CAPPED]
)
def test_methods_that_attend_themselves_are_refused(name: str, method: str) -> None:
    model = build(name)
    with pytest.raises(ValueError, match=r"attention of its own .* set window, heads and cut"):
        attach(model, config(name, method), prompt=PROMPT)
    attach(model, PruneConfig(keep=0.5)).detach()  # nothing was left behind


@pytest.mark.parametrize(("name", "method"), WORKS)
def test_what_is_dropped_is_gone(name: str, method: str) -> None:
    """Fewer tokens reach the layers, the report says how many, and those that do compute what the
    bare language model computes from them with the dropped ones hidden."""
    with (
        attached(name, config(name, method, positions="original")) as (model, pruner),
        torch.no_grad(),
    ):
        data = prompts(batch(name, model, rows_of(name), "left"))
        with (
            recorded_rows(model) as rows,
            counted_rows(model) as counts,
            text_calls(model) as calls,
        ):
            model(**data, use_cache=False)
        report = pruner.report
        kwargs, found = calls[-1]  # a question read alone came before
    depth = len(model.get_decoder().layers)
    counts = counts[-depth:]
    assert sum(report.kv_entries) < depth * sum(report.tokens_in)
    assert report.visual_in == visual_counts(data)
    if method != "yopo":  # its feed-forward layers see visual tokens apart
        assert counts == computed(name, report.drops)
        assert counts[-1] < data["input_ids"].numel()
    if method in NOT_MASKING:
        return
    drops = drops_of(rows)
    expected = masked_text(build(name), kwargs, drops)
    last = rows["rows"][-1].token
    assert len(last) < data["attention_mask"].sum()
    apart = (found - expected).flatten(0, 1)[last].abs().max()
    assert apart < rounding(expected)


@pytest.mark.parametrize(("name", "method"), WORKS)
def test_a_batch_is_its_rows(name: str, method: str) -> None:
    with attached(name, config(name, method)) as (model, pruner), torch.no_grad():
        rows = rows_of(name)
        data = prompts(batch(name, model, rows, "left"))
        together = model(**data).logits[:, -1]
        entries = pruner.report.kv_entries
        for index in (2, *((3, 4) if name in VIDEO_FAMILIES else ()), len(rows) - 1):
            # Several images, clips, an image beside a clip, text alone.
            one = prompts(batch(name, model, rows, "left", order=(index,)))
            alone = model(**one).logits[0, -1]
            # As in tests/test_method_oracles.py: merged contents and rotary phases differ, too.
            assert (together[index] - alone).abs().max() < 10 * rounding(together)
            if visual_counts(one)[0]:
                assert pruner.report.kv_entries == [entries[index]]


@pytest.mark.parametrize(("name", "method"), WORKS)
def test_a_step_trains(name: str, method: str) -> None:
    """Forward with labels and backward; an answer directly behind an image, too."""
    with attached(name, config(name, method), train=True) as (model, _):
        order = (2, 4) if name in VIDEO_FAMILIES else (1, 2)  # several images, beside a clip
        data = batch(name, model, rows_of(name), order=order)
        end, begin = data["input_ids"] == END, data["input_ids"] == BEGIN
        assert end.any()
        assert begin.any()
        data["labels"] = torch.where(end, data["input_ids"], data["labels"])
        if method == "downsample":
            data["labels"][end] = -100  # what must stay there has no content: refused
        loss = model(**data).loss
        loss.backward()
        weight = model.get_decoder().layers[-1].mlp.down_proj.weight
    assert loss.isfinite()
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ANY_SIZE)
def test_windows_need_images_of_one_size(name: str) -> None:
    model = build(name)
    data = prompts(batch(name, model, ((4, "image", 6),)))

    def forward() -> None:
        attach(model, PruneConfig("yopo", keep=0.5), prompt=PROMPT)
        model(**data)

    with pytest.raises(ValueError, match=r"window.* null|window: null"):
        forward()


@pytest.mark.parametrize("name", MROPE)
def test_ids_of_three_axes_stay(name: str) -> None:
    """A method that publishes contiguous ids uses the host's where a token has three."""
    found: list[Tensor] = []
    for positions in (None, "original"):
        with attached(name, config(name, "divprune", positions=positions)) as (model, _):
            found.append(model(**prompts(batch(name, model, rows_of(name)))).logits)
    assert torch.equal(*found)
    model = build(name)
    with pytest.raises(ValueError, match=r"prune\.positions: contiguous .* original"):
        attach(model, config(name, "divprune", positions="contiguous"))


@pytest.mark.parametrize("name", [n for n in TOKEN_FAMILIES if n not in MROPE])
def test_contiguous_positions_are_a_short_prompt(name: str) -> None:
    """Renumbered before the LLM: the bare language model on the kept tokens alone. Which tokens a
    sliding window or a block of both directions lets see each other stays as in the full prompt."""
    with (
        attached(name, config(name, "uniform", positions="contiguous")) as (model, _),
        torch.no_grad(),
    ):
        data = prompts(batch(name, model, ((4, "image", 6),)))
        with recorded_rows(model) as rows, text_calls(model) as calls:
            model(**data, use_cache=False)
        (kwargs, found) = calls[-1]
        kept = rows["rows"][0].position
    mask = kwargs["attention_mask"]
    if isinstance(mask, dict):
        mask = {kind: None if m is None else m[:, :, kept][..., kept] for kind, m in mask.items()}
    else:
        mask = None
    first = 1 if name.startswith("paligemma") else 0  # it counts from one
    with torch.no_grad():
        expected = build(name).get_decoder()(
            inputs_embeds=kwargs["inputs_embeds"][:, kept],
            position_ids=torch.arange(len(kept))[None] + first,
            attention_mask=mask,
        )
    apart = (found[0, kept] - expected.last_hidden_state[0]).abs().max()
    assert apart < rounding(found)
