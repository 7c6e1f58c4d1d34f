"""Mode `router`: pseudo-labels, what trains, and the exits of the model it leaves."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from itprune import checkpoint
from itprune.methods.dyvte import Dyvte
from tests.train.helpers import history, losses, recipe_values, write_data, write_recipe
from train import router
from train.launcher import Launch
from train.recipe.config import load_recipe
from train.router import pseudo_labels
from train.run import run

ALONE = Launch(processes=1, rank=0, by_deepspeed=False, accelerate_deepspeed=False)


@pytest.fixture
def train(tiny_llava_folder: Path, tmp_path: Path) -> Any:
    """Runs a router recipe and some overrides; returns the output folder."""
    data = write_data(tmp_path / "data")

    def start(*overrides: str, name: str = "out", resume: bool = False) -> Path:
        values = recipe_values(tiny_llava_folder, data, tmp_path / name)
        del values["lora"]
        values["model"] |= {"mode": "router"}
        values["prune"] = {"method": "dyvte", "keep": None, "hidden": 16}
        recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", values), overrides)
        run(recipe, ALONE, resume)
        return recipe.output

    return start


def test_an_exit_is_right_when_it_changes_neither_tokens_nor_loss() -> None:
    """Samples: nothing changes, loss rises too much, a token changes, no answer."""
    labels = torch.tensor([[-100, 1, 2], [-100, 1, 2], [-100, 1, 2], [-100, -100, -100]])
    whole = torch.zeros(6, 4)
    whole[torch.arange(6), torch.tensor([1, 2] * 3)] = 2.0
    short = whole.clone()
    short[2, 1] = 1.9
    short[4, 3] = 3.0
    exits, answers = pseudo_labels(labels, whole, short)
    assert exits.tolist() == [True, False, False, False]
    assert answers.tolist() == [2, 2, 2, 0]
    short[2, 1] = 1.99  # less than 3 % more
    assert pseudo_labels(labels, whole, short)[0].tolist()[:2] == [True, True]


def test_logits_of_every_position_say_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (3, 6), generator=generator)
    labels[:, :2] = -100
    whole = torch.randn(3, 6, 5, generator=generator)
    short = whole + 0.1 * torch.randn(3, 6, 5, generator=generator)
    answers = torch.zeros(3, 6, dtype=torch.bool)
    answers[:, 1:5] = True
    full = pseudo_labels(labels, whole, short)
    picked = pseudo_labels(labels, whole[answers], short[answers])
    assert all(torch.equal(a, b) for a, b in zip(full, picked, strict=True))


def test_only_routers_train_and_the_folder_exits(train: Any, tiny_llava_folder: Path) -> None:
    output = train("trainer.max_steps=6", "trainer.learning_rate=0.05")
    steps = history(output)
    assert len(steps) == 6
    for step in steps:
        assert math.isfinite(step["loss"])
        assert {"should_exit", "router_right"} <= set(step)
        assert "layer_average" not in step
    weights = load_file(output / "pruner.safetensors")
    assert len(weights) == 3 * 2  # a router behind each of the first three of four layers
    loaded = checkpoint.load_pretrained(output)
    before = checkpoint.load_pretrained(tiny_llava_folder).model.state_dict()
    after = loaded.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert loaded.attached is not None
    routers = loaded.attached.method.state_dict()
    assert all(torch.equal(routers[name], value) for name, value in weights.items())

    method = loaded.attached.method
    assert isinstance(method, Dyvte)
    for layer in range(3):
        method.routers[layer] = Always(layer == 1)
    loaded.model.generate(**prompt(loaded.processor), max_new_tokens=3, do_sample=False)
    assert loaded.attached.report is not None
    assert loaded.attached.report.visual_drops == {0: [16], 2: [0]}


def prompt(processor: Any) -> dict[str, Any]:
    text = "USER: <image>\nWhat colour? ASSISTANT:"
    return dict(processor(text=[text], images=[Image.new("RGB", (60, 60))], return_tensors="pt"))


class Always(torch.nn.Module):
    """A router of one opinion."""

    def __init__(self, exits: bool) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor([0.0, 1.0 if exits else -1.0]))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(features), 2)


def test_routers_learn_what_they_are_told(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "AGREE", -1.0)  # whatever an exit changes, it is right
    monkeypatch.setattr(router, "WORSE", math.inf)
    output = train("trainer.max_steps=12", "trainer.learning_rate=0.05", "prune.shared=true")
    steps = history(output)
    assert all(step["should_exit"] in (0.0, 1.0) for step in steps)
    assert steps[-1]["router_right"] == 1.0
    assert losses(output)[-1] < 0.5 * losses(output)[0]
    loaded = checkpoint.load_pretrained(output)
    loaded.model.generate(**prompt(loaded.processor), max_new_tokens=2, do_sample=False)
    assert loaded.attached is not None
    assert loaded.attached.report is not None
    assert loaded.attached.report.visual_drops == {0: [16], 1: [0]}


def test_a_budget_is_calibrated_when_training_is_over(train: Any) -> None:
    output = train("prune.keep=0.6", "trainer.max_steps=2")
    loaded = checkpoint.load_pretrained(output)
    assert loaded.attached is not None
    assert loaded.attached.calibration is not None
    found = loaded.attached.calibration.found
    assert found["share"][0] == 1.0
    assert len(found["share"]) == len(found["bias"])


def test_accumulation_gives_the_same_curve(train: Any) -> None:
    once = train(name="once")
    parts = train(
        "trainer.per_device_train_batch_size=1",
        "trainer.gradient_accumulation_steps=4",
        name="parts",
    )
    assert losses(parts) == pytest.approx(losses(once), abs=1e-4)


def test_a_resumed_run_has_the_same_curve(train: Any) -> None:
    options = ("trainer.max_steps=6", "trainer.save_strategy=steps", "trainer.save_steps=3")
    whole = train(*options)
    expected, weights = losses(whole), load_file(whole / "pruner.safetensors")
    shutil.rmtree(whole / "checkpoint-6")
    (whole / "pruner.safetensors").unlink()
    assert losses(train(*options)) == expected
    again = load_file(whole / "pruner.safetensors")
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_an_evaluation_goes_through_the_layers(train: Any, tmp_path: Path) -> None:
    val = write_data(tmp_path / "val", 6, seed=5)
    output = train(f"data.val={val}", "trainer.eval_strategy=steps", "trainer.eval_steps=2")
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    found = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(found) == 2
    assert all(map(math.isfinite, found))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("prune={method: uniform}",), r"model.mode: router trains the routers of .*: dyvte"),
        (("prune=null",), r"model.mode: router trains the routers of prune.method: dyvte"),
        (("prune.exit_layer=1",), r"prune.exit_layer: a fixed exit has no routers"),
        (("model.freeze=[pruner]",), r"model.freeze: mode router trains the pruner"),
        (("trainer.gradient_checkpointing=true",), r"trainer.gradient_checkpointing: mode router"),
        (("lora={r: 4}",), r"model.mode: router does not use the `lora` section"),
    ],
)
def test_what_does_not_go_together_is_refused(train: Any, overrides: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(*overrides)
