"""The oracles of the design for every method: what applies, what does not, and why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from itprune import PromptFormat, PruneConfig, attach, load_pretrained, methods, save_pretrained
from itprune.attach import Attached
from itprune.methods import method_class
from tests.models import ASSISTANT, DEPTH, IMAGE, ROWS, batch, prompts, tiny_llava
from tests.oracle import drops_of, masked, recorded_rows

PROMPT = PromptFormat((0, 1, 2, *ASSISTANT), ASSISTANT)
NAMES = [name for name in methods() if method_class(name).__module__.startswith("itprune.")]
"""Other tests register methods of their own."""
OPTIONS: dict[str, dict[str, object]] = {
    "quecc": {"kernel": 2},
    "dyvte": {"exit_layer": 2},
    "gsearch": {"schedule": [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]},
}
FREE = {"quecc", "dyvte", "gsearch", "itprune", "prumerge", "prumerge_plus"}
"""Methods whose own rule is tried, without a target."""

DOES_NOT_APPLY = {
    ("masking", "sparsevlm"): "dropped tokens go on inside kept ones, so later inputs differ",
    ("masking", "yopo"): "windows and head gates are no key mask; tests/test_yopo.py has its own",
    ("masking", "dense"): "nothing is dropped",
    ("short", "dense"): "nothing is dropped",
    ("answers", "dense"): "nothing is dropped",
    ("short", "yopo"): "the rows of a layer are not all a later layer computes with",
    ("train_eval", "dense"): "nothing is dropped",
    ("train_eval", "vistog"): "published grouping is noisy in training and hard afterwards",
}


def cases(oracle: str) -> pytest.MarkDecorator:
    """Every method the oracle applies to."""
    fitting = [name for name in NAMES if (oracle, name) not in DOES_NOT_APPLY]
    return pytest.mark.parametrize("name", fitting)


def config(name: str, **changes: object) -> PruneConfig:
    keep = None if name in FREE else 0.5
    return PruneConfig(name, keep=keep, options=OPTIONS.get(name, {})).replace(**changes)


@contextmanager
def attached(name: str, train: bool = False, **changes: object) -> Iterator[tuple]:
    """A tiny model with the method attached; its own weights are made random but repeatable."""
    model = tiny_llava().train(train)
    torch.manual_seed(0)
    with attach(model, config(name, **changes), prompt=PROMPT) as pruner:
        shake(pruner)
        yield model, pruner


def shake(pruner: Attached) -> None:
    """Takes trained parts away from neutral initial values."""
    generator = torch.Generator().manual_seed(5)
    for weight in pruner.method.parameters():
        noise = torch.randn(weight.shape, generator=generator) * 0.1
        weight.data.add_(noise)


def texts_input(model: torch.nn.Module) -> tuple[list[Tensor], Callable[[], None]]:
    """Collects what the text model is called with; the last call is the prompt's, others may be
    questions read alone."""
    seen: list[Tensor] = []

    def look(module, args, kwargs):
        seen.append(kwargs["inputs_embeds"].detach().clone())

    handle = model.get_decoder().register_forward_pre_hook(look, with_kwargs=True, prepend=True)
    return seen, handle.remove


def test_every_method_is_tried() -> None:
    assert {name for _, name in DOES_NOT_APPLY} <= set(NAMES)
    assert set(OPTIONS) | FREE <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_keep_one_is_the_bare_model(name: str) -> None:
    model, data = tiny_llava().train(), batch()
    expected = model(**data)
    with attach(model, PruneConfig(name, keep=1.0, options=OPTIONS.get(name, {})), prompt=PROMPT):
        found = model(**data)
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(found.logits, expected.logits)
    assert torch.equal(model(**data).loss, expected.loss)
    assert "pruner" not in dict(model.named_children())


@cases("masking")
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_dropping_is_masking(name: str, layout: str) -> None:
    """Original positions: the bare text model with dropped keys hidden gives the same logits."""
    data = prompts(batch(side="left"))
    with (
        attached(name, positions="original", layout=layout) as (model, _),
        recorded_rows(model) as rows,
    ):
        seen, stop = texts_input(model)
        found = model(**data).logits
        stop()
    bare, text = tiny_llava(), {"attention_mask": data["attention_mask"]}
    with masked(bare, drops_of(rows)):
        expected = bare.lm_head(
            bare.get_decoder()(inputs_embeds=seen[-1], **text).last_hidden_state
        )
    last = rows["rows"][-1]
    alive = last.token if last is not None else data["attention_mask"].flatten().nonzero()[:, 0]
    assert len(alive) < data["attention_mask"].sum()
    assert (found - expected).flatten(0, 1)[alive].abs().max() < 1e-5


@cases("short")
def test_contiguous_positions_are_a_short_prompt(name: str) -> None:
    """Renumbered before the LLM: the bare text model on the kept tokens alone, nothing else."""
    data = prompts(batch((ROWS[0],)))
    with attached(name, positions="contiguous") as (model, pruner), recorded_rows(model) as rows:
        if "before_llm" not in pruner.method.places or pruner.method.layers():
            pytest.skip("acts inside the LLM: tests/test_positions.py")
        seen, stop = texts_input(model)
        found = model(**data).logits[0]
        stop()
    kept = rows["rows"][0].position
    bare = tiny_llava()
    expected = bare.lm_head(bare.get_decoder()(inputs_embeds=seen[-1][:, kept]).last_hidden_state)
    assert (found[kept] - expected[0]).abs().max() < 1e-5


@cases("rows")
def test_a_batch_is_its_rows(name: str) -> None:
    with attached(name) as (model, pruner):
        data = prompts(batch(side="left"))
        found = model(**data).logits
        tokens = pruner.report.kv_entries if pruner.report else None
        image = 0
        for row in range(len(ROWS)):
            count = ROWS[row].count("image")
            mask = data["attention_mask"][row].bool()
            one = {"input_ids": data["input_ids"][row, mask][None]}
            if count:
                one["pixel_values"] = data["pixel_values"][image : image + count]
            image += count
            alone = model(**one).logits[0, -1]
            assert (found[row, -1] - alone).abs().max() < 1e-4
            if count and tokens is not None:
                assert pruner.report.kv_entries == [tokens[row]]


@cases("checkpointing")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        with attached(name, train=True) as (model, _):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
            torch.manual_seed(3)
            model(**batch()).loss.backward()
            return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    for key in plain:
        assert torch.equal(plain[key], again[key]), key


@cases("generate")
def test_generate_is_a_loop_without_a_cache(name: str) -> None:
    data = prompts(batch((ROWS[0][:3], ROWS[2][:5], (7,)), side="left"))
    prefix = torch.tensor(ASSISTANT).expand(3, -1)
    data["input_ids"] = torch.cat([data["input_ids"], prefix], 1)
    data["attention_mask"] = torch.cat([data["attention_mask"], torch.ones_like(prefix)], 1)
    with attached(name) as (model, _):
        out = model.generate(**data, max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE])
        loop = dict(data)
        for _ in range(4):
            mask = loop["attention_mask"]
            ids = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(**loop, position_ids=ids, use_cache=False).logits[:, -1]
            logits[:, IMAGE] = -torch.inf
            token = logits.argmax(-1, keepdim=True)
            loop["input_ids"] = torch.cat([loop["input_ids"], token], 1)
            loop["attention_mask"] = torch.cat([mask, torch.ones_like(token)], 1)
    assert torch.equal(out, loop["input_ids"])


@cases("train_eval")
def test_training_and_inference_choose_the_same(name: str) -> None:
    with attached(name) as (model, _):
        data = batch()
        with recorded_rows(model) as rows, torch.no_grad():
            model.eval()(**data)
            first = [None if r is None else r.token.tolist() for r in rows["rows"]]
            model.train()(**data)
            second = [None if r is None else r.token.tolist() for r in rows["rows"]]
    assert first == second


@cases("answers")
def test_answers_choose_nothing(name: str) -> None:
    """What a training sample keeps does not depend on what it is to say."""
    data = batch(ROWS[:3])
    spoken = data["labels"] != -100
    other = torch.where(spoken, (data["input_ids"] + 37) % 240 + 3, data["input_ids"])
    with attached(name) as (model, _), recorded_rows(model) as rows, torch.no_grad():
        model(**data)
        first = [r.token.tolist() for r in rows["rows"]]
        model(**{**data, "input_ids": other})
        assert first == [r.token.tolist() for r in rows["rows"]]


@cases("captions")
def test_an_answer_may_follow_an_image_directly(name: str) -> None:
    """The position before an answer stays, whatever a method makes of the image."""
    with attached(name, train=True) as (model, _):
        loss = model(**caption()).loss
        loss.backward()
    assert loss.isfinite()


def test_a_shrunk_image_has_nothing_for_a_slot_that_must_stay() -> None:
    with (
        attached("downsample", train=True, keep=0.03) as (model, _),
        pytest.raises(ValueError, match="an answer follows an image directly"),
    ):
        model(**caption())


def caption() -> dict[str, Tensor]:
    ids = torch.tensor([[1, *[IMAGE] * 36, 9, 8, 7]])
    labels = torch.where(torch.arange(40) > 36, ids, -100)
    return {"input_ids": ids, "labels": labels, "pixel_values": batch((ROWS[0],))["pixel_values"]}


@cases("counted")
def test_the_report_counts_what_layers_really_see(name: str) -> None:
    counted: list[int] = []
    with attached(name) as (model, pruner):
        handles = [
            layer.mlp.register_forward_hook(
                lambda m, args, out: counted.append(args[0][..., 0].numel())
            )
            for layer in model.get_decoder().layers
        ]
        model(**prompts(batch((ROWS[0],))))
        for handle in handles:
            handle.remove()
        if name == "dense":
            assert pruner.report is None
            return
        report = pruner.report
    counted = counted[-DEPTH:]  # a question read alone came before
    assert sum(report.kv_entries) < DEPTH * sum(report.tokens_in)
    assert sum(counted) <= sum(report.kv_entries)
    if name != "yopo":  # its feed-forward layers see visual tokens apart
        assert sum(counted) == sum(report.kv_entries)


@cases("checkpoint")
def test_a_saved_pruner_chooses_the_same(name: str, tmp_path, tiny_llava_folder) -> None:
    loaded = load_pretrained(tiny_llava_folder)
    torch.manual_seed(0)
    data = _inputs(loaded)
    options = {**OPTIONS.get(name, {})}
    if name == "gsearch":
        options["schedule"] = [1.0, 0.5, 0.25, 0.0]
    with attach(loaded.model, config(name, options=options)) as pruner, torch.no_grad():
        shake(pruner)
        expected = loaded.model(**data).logits
        save_pretrained(tmp_path / "run", loaded.model, loaded.processor, pruner)
    again = load_pretrained(tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(again.model(**data).logits, expected)


def _inputs(loaded) -> dict[str, Tensor]:
    size = loaded.model.config.vision_config.image_size
    patches = (size // loaded.model.config.vision_config.patch_size) ** 2
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(30, 60, (1, 12), generator=generator)
    image = torch.full((1, patches), loaded.model.config.image_token_id)
    return {
        "input_ids": torch.cat([ids[:, :4], image, ids[:, 4:]], 1),
        "pixel_values": torch.randn(1, 3, size, size, generator=generator),
    }
