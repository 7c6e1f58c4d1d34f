"""Gradient checkpointing of both kinds: the same curves, the same gradients, in every mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from itprune import PromptFormat, PruneConfig, attach
from tests.family_models import ASSISTANT, NAMES, batch, build
from tests.train.helpers import losses, train_here, write_data
from train.model import limit_input_grads
from train.recipe.arguments import check_reentry, training_arguments

MODES = {
    "lora": ("lora.dropout=0.1",),
    "projector": ("model.mode=projector", "lora=null"),
    "full": ("model.mode=full", "lora=null"),
    "tower": ("model.mode=full", "lora=null", "model.freeze=[]"),
    "pruner": ("prune.method=quecc", "prune.keep=0.25"),
}
AGAIN = "trainer.gradient_checkpointing=true"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def kind(reentrant: bool) -> str:
    return f"trainer.gradient_checkpointing_kwargs={{use_reentrant: {str(reentrant).lower()}}}"


@pytest.mark.parametrize("mode", MODES)
def test_both_kinds_leave_the_curve_of_every_mode(
    mode: str, tiny_llava_folder: Path, data: Path, tmp_path: Path
) -> None:
    def train(name: str, *overrides: str) -> list[float]:
        options = ("prune.keep=0.4", *MODES[mode], *overrides)
        return losses(train_here(tiny_llava_folder, data, tmp_path / name, *options))

    plain = train("plain")
    assert len(set(plain)) == 4
    for reentrant in (False, True):
        assert train(str(reentrant), AGAIN, kind(reentrant)) == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_reentrant_checkpointing_keeps_every_gradient_of_every_family(
    name: str, keep: float
) -> None:
    model = build(name).train()
    inputs = batch(name, model)
    with attach(model, PruneConfig(keep=keep), prompt=PromptFormat((0, 1, 2, *ASSISTANT))):
        found = []
        for reentrant in (False, True):
            if reentrant:
                model.gradient_checkpointing_enable({"use_reentrant": True})
            model.zero_grad()
            model(**inputs).loss.backward()
            found.append(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            )
    plain, again = found
    assert plain.keys() == again.keys()
    largest = max(float(g.abs().max()) for g in plain.values())
    for parameter, gradient in plain.items():
        assert torch.allclose(gradient, again[parameter], atol=1e-5 * largest), parameter


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_a_frozen_tower_is_not_trained_through(reentrant: bool, trains: bool) -> None:
    model = build("llava").train()
    inputs = batch("llava", model)
    model.model.vision_tower.requires_grad_(trains)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    limit_input_grads(model, reentrant)
    asked = []
    projector = model.model.multi_modal_projector
    projector.register_forward_pre_hook(lambda _, args: asked.append(args[0].requires_grad))
    model(**inputs).loss.backward()
    assert asked == [trains]
    assert all(p.grad is not None for p in projector.parameters())


def test_reentry_beside_unused_weights_is_refused_under_ddp(tmp_path: Path) -> None:
    values = {"output_dir": str(tmp_path), "use_cpu": True, "gradient_checkpointing": True}
    usual = training_arguments(values, 0)
    again = {**values, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    reentrant = training_arguments(again, 0)
    for args, ddp, unused in (
        (usual, True, True),
        (reentrant, False, True),
        (reentrant, True, False),
    ):
        check_reentry(args, ddp, unused)
    with pytest.raises(
        ValueError, match=r"^trainer.gradient_checkpointing_kwargs: .* set use_reent"
    ):
        check_reentry(reentrant, ddp=True, unused=True)


@pytest.mark.parametrize("given", [None, {"every_n_layers": 2}, {"use_reentrant": True}])
def test_the_kind_without_reentry_is_the_usual_one(tmp_path: Path, given: Any) -> None:
    values = {"output_dir": str(tmp_path), "use_cpu": True, "gradient_checkpointing": True}
    if given is not None:
        values["gradient_checkpointing_kwargs"] = given
    args = training_arguments(values, 0)
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False, **(given or {})}
