"""quecc, setok, vistog alike: batches, gradients, one size, and whole models with the engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from itprune import PromptFormat, PruneConfig, attach
from itprune.methods.base import Method
from tests.handmade import (
    NAMES,
    WIDTH,
    built,
    contents,
    image,
    images_of,
    seeded,
    shaken,
    with_extra,
)
from tests.models import ASSISTANT, batch, prompts, tiny_llava


@pytest.mark.parametrize("keep", [None, 0.25])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_its_rows(name: str, keep: float | None) -> None:
    method = shaken(built(name, keep))
    parts = [image(12, 12, seed) for seed in (0, 10, 20)]
    together = method(with_extra(method, *parts))
    alone = [method(with_extra(method, part)) for part in parts]
    assert torch.equal(together.keep, torch.cat([one.keep for one in alone]))
    expected = torch.cat([contents(one) for one in alone])
    assert torch.allclose(contents(together), expected, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_weight_and_the_features(name: str) -> None:
    method = shaken(built(name)).train()
    parts = [image(12, 12, seed) for seed in (0, 10)]
    features = [part["features"].requires_grad_() for part in parts]
    weight = seeded(len(contents(method(with_extra(method, *parts)))), WIDTH, seed=4)
    (contents(method(with_extra(method, *parts))) * weight).sum().backward()
    for found, weight in method.named_parameters():
        assert weight.grad is not None, found
        assert weight.grad.isfinite().all(), found
        assert weight.grad.any(), found
    assert all(one.grad is not None and one.grad.any() for one in features)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_features_meet_float_weights(name: str) -> None:
    method = built(name, 0.25)
    part = image(12, 12, 0)
    part = {key: x.bfloat16() if x.is_floating_point() else x for key, x in part.items()}
    kept = method(with_extra(method, part))
    assert contents(kept).dtype == torch.bfloat16
    assert contents(kept).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_class_token_among_the_visual_tokens_is_left_out(name: str) -> None:
    method = shaken(built(name, 0.25))
    parts = [image(12, 12, seed) for seed in (0, 10)]
    plain = with_extra(method, *parts)
    first = torch.full((1, WIDTH), 7.0)
    features = torch.cat([torch.cat([first, part["features"]]) for part in parts])
    more = replace(plain, features=features, lens=plain.lens + 1, slots=plain.slots + 1)
    assert torch.allclose(contents(method(more)), contents(method(plain)), atol=1e-5)


def test_visual_tokens_off_the_grid_are_refused() -> None:
    images = images_of(image(12, 12, 0))
    with pytest.raises(ValueError, match="form a grid"):
        built("setok")(replace(images, lens=images.lens - 5, features=images.features[5:]))


# ------------------------------------------------------------------------------------ one size
@pytest.mark.parametrize("name", ["quecc", "vistog"])
def test_the_size_is_chosen_once(name: str) -> None:
    method = built(name, 0.1)
    size = method.size
    weights = [id(weight) for weight in method.parameters()]
    method.share(1.0)
    method.share(None)
    method.share(0.1)
    assert method.size == size
    assert weights == [id(weight) for weight in method.parameters()]
    with pytest.raises(ValueError, match=f"several, or name prune.{method.size_option}"):
        method.share(0.5)
    assert method.keep == 0.1
    named = built(name, 1.0, **{method.size_option: 3})
    for keep in (0.9, 0.5, 0.1):
        named.share(keep)
    assert named.size == 3


@pytest.mark.parametrize("name", ["quecc", "vistog"])
def test_a_checkpoint_runs_at_its_own_size(name: str) -> None:
    trained = shaken(built(name, 0.1))
    state = trained.state_dict()
    again = built(name, 0.1)
    again.load_state_dict(state)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in state.items())
    dense = built(name, 1.0)
    dense.load_state_dict(state)
    assert dense.size == trained.size
    dense.share(0.1)
    with pytest.raises(ValueError, match=f"trained with {trained.size}"):
        built(name, 0.5).load_state_dict(state)


# ------------------------------------------------------------------------------------ whole models
OPTIONS = {"quecc": {"kernel": 3, "heads": 4}, "setok": {}, "vistog": {"tokens": 4}}
KEPT = {"quecc": 4, "setok": 7, "vistog": 4}
PROMPT = PromptFormat((0, 1, 2, *ASSISTANT), ASSISTANT)


def attached_model(name: str) -> tuple[nn.Module, Method]:
    model = tiny_llava()
    torch.manual_seed(1)
    attached = attach(
        model, PruneConfig(name, KEPT[name] / 36, options=OPTIONS[name]), prompt=PROMPT
    )
    shaken(attached.method)
    return model, attached


@pytest.mark.parametrize("name", NAMES)
def test_the_language_loss_trains_them(name: str) -> None:
    model, attached = attached_model(name)
    model.train()
    found = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(2)
        model(**batch()).loss.backward()
        found.append({key: x.grad.clone() for key, x in attached.method.named_parameters()})
    assert attached.report.visual_stage1[:3] == [KEPT[name], KEPT[name], 2 * KEPT[name]]
    for key, gradient in found[0].items():
        assert gradient.isfinite().all(), key
        assert gradient.any(), key
        assert torch.allclose(gradient, found[1][key], atol=1e-6), key


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_do_not_meet_and_generate_starts_like_a_forward(name: str) -> None:
    model, _ = attached_model(name)
    data = prompts(batch(((5, "image", 9), (3, "image", 4), (7,)), side="left"))
    settings = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
    with torch.no_grad():
        together = model(**data).logits[:, -1]
        out = model.generate(**data, **settings, output_logits=True)
        assert torch.allclose(out.logits[0], together, atol=1e-5)
        for index in range(2):
            alone = {key: x[index : index + 1] for key, x in data.items()}
            assert torch.allclose(model(**alone).logits[0, -1], together[index], atol=1e-5)


def test_quecc_never_sees_an_answer() -> None:
    model, _ = attached_model("quecc")
    seen = []
    model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().clone())
    )
    for row in ((5, "image", 9, "answer"), ("image", "answer")):
        data = batch((row,))
        answer = data["labels"] != -100
        asked = ~answer & (data["input_ids"] > 2) & (data["input_ids"] < 250)
        seen.clear()
        for change in (None, answer, asked):
            ids = data["input_ids"].clone()
            if change is not None:
                ids[change] = 3 + (ids[change] + 11) % 240
            model(**{**data, "input_ids": ids})
        first, other_answer, other_question = seen
        assert torch.equal(first, other_answer)
        assert torch.equal(first, other_question) == (not bool(asked.any()))
