"""Methods with trained parts in a run: what trains, what is saved, how it goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from itprune import checkpoint
from itprune.host import Host
from itprune.methods import register_method
from itprune.methods.base import Method, NoOptions
from itprune.methods.fixed import fixed_count
from itprune.tokens import Images, Kept, spread
from tests.train.helpers import losses, recipe_values, write_data, write_recipe
from train.launcher import Launch
from train.recipe.config import load_recipe
from train.run import run
from train.saving import split_parts

ALONE = Launch(processes=1, rank=0, by_deepspeed=False, accelerate_deepspeed=False)
NAME = "toy_trained"


@register_method(NAME)
class Toy(Method):
    """Evenly spaced tokens, each moved by one trained layer."""

    places = ("before_llm",)

    def __init__(self, options: NoOptions, host: Host) -> None:
        super().__init__(options, host)
        self.move = torch.nn.Linear(host.vision_width, host.vision_width)

    def before_llm(self, images: Images) -> Kept:
        keep = spread(images.slots, fixed_count(self.keep, images.slots))
        return Kept(keep, images.features + self.move(images.features))


@pytest.fixture
def train(tiny_llava_folder: Path, tmp_path: Path) -> Any:
    """Runs a recipe with the toy method and some overrides; returns the output folder."""
    data = write_data(tmp_path / "data")

    def start(*overrides: str, name: str = "out") -> Path:
        values = recipe_values(tiny_llava_folder, data, tmp_path / name)
        values["prune"] = {"method": NAME, "keep": 0.5}
        recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", values), overrides)
        run(recipe, ALONE)
        return recipe.output

    return start


def parts(output: Path) -> dict[str, Tensor]:
    return load_file(output / "pruner.safetensors")


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_projector_mode_trains_projector_and_pruner(
    train: Any, tiny_llava_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    projector = ("model.mode=projector", "lora=null")
    output = train(*projector)
    assert "weights (projector, pruner)" in capsys.readouterr().out
    still = train(*projector, "trainer.learning_rate=0.0", name="still")
    assert moved(parts(still), parts(output)) == {"move.weight", "move.bias"}
    before = checkpoint.load_pretrained(tiny_llava_folder).model.state_dict()
    after = load_file(output / "model.safetensors")
    assert not any("pruner" in name for name in after)
    loaded = checkpoint.load_pretrained(output)
    changed = moved(before, loaded.model.state_dict())
    assert changed
    assert all("multi_modal_projector" in name for name in changed)
    assert loaded.attached is not None
    assert not moved(parts(output), loaded.attached.method.state_dict())


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_other_modes_train_it_too_unless_it_is_frozen(
    train: Any, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = () if mode == "lora" else ("model.mode=full", "lora=null")
    output = train(*options)
    freeze = "[pruner]" if mode == "lora" else "[vision, pruner]"
    frozen = train(*options, f"model.freeze={freeze}", name="frozen")
    assert moved(parts(frozen), parts(output)) == {"move.weight", "move.bias"}
    described = [line for line in capsys.readouterr().out.splitlines() if " weights (" in line]
    assert "(language, projector, pruner)" in described[0]
    assert "(language, projector)" in described[1]
    loaded = checkpoint.load_pretrained(output)
    assert loaded.attached is not None
    assert not moved(parts(output), loaded.attached.method.state_dict())


@pytest.mark.parametrize("mode", ["lora", "projector", "bf16", "frozen", "routers"])
def test_a_resumed_run_has_the_same_curve(train: Any, mode: str) -> None:
    options = ("trainer.max_steps=8", "trainer.save_strategy=steps", "trainer.save_steps=4")
    more = {
        "projector": ("model.mode=projector", "lora=null"),
        "bf16": ("trainer.bf16=true",),
        "frozen": ("model.freeze=[pruner]",),
        "routers": ("prune={method: dyvte, keep: null, hidden: 8}",),
    }
    options = (*options, *more.get(mode, ()))
    whole = train(*options)
    expected, weights = losses(whole), parts(whole)
    shutil.rmtree(whole / "checkpoint-8")
    (whole / "pruner.safetensors").unlink()
    assert losses(train(*options)) == expected
    assert not moved(weights, parts(whole))


def test_a_second_stage_goes_on_from_the_first(train: Any) -> None:
    first = train("model.mode=projector", "lora=null", name="first")
    second = train(f"model.path={first}", "trainer.learning_rate=0.0", name="second")
    assert not moved(parts(first), parts(second))
    other = train(f"model.path={first}", "prune.method=uniform", name="other")
    assert not (other / "pruner.safetensors").exists()


def test_parts_that_do_not_fit_are_refused(train: Any) -> None:
    prune = ("model.mode=router", "lora=null", "trainer.max_steps=1")
    first = train(*prune, "prune={method: dyvte, keep: null, hidden: 8}", name="first")
    with pytest.raises(
        ValueError, match=r"pruner.safetensors: does not fit the options in `prune`"
    ):
        train(
            *prune,
            f"model.path={first}",
            "prune={method: dyvte, keep: null, hidden: 4}",
            name="second",
        )


@pytest.mark.parametrize("mode", ["lora", "projector"])
def test_the_best_checkpoint_comes_back_whole(train: Any, tmp_path: Path, mode: str) -> None:
    values = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": "true",
        "metric_for_best_model": "loss",
        "greater_is_better": "true",  # so that the first checkpoint is the best one
    }
    mode_is = ("model.mode=projector", "lora=null") if mode == "projector" else ()
    val = write_data(tmp_path / "val", 6, seed=5)
    options = [f"trainer.{name}={value}" for name, value in values.items()]
    output = train(f"data.val={val}", *options, *mode_is)
    state = json.loads((output / "trainer_state.json").read_text())
    best, last = Path(state["best_model_checkpoint"]), output / "checkpoint-4"
    assert best != last
    name = "model.safetensors" if mode == "projector" else "adapter_model.safetensors"
    for file in (name, "pruner.safetensors"):
        assert not moved(load_file(best / file), load_file(output / file))
        assert moved(load_file(last / file), load_file(output / file))


def test_a_gathered_state_is_divided() -> None:
    one = torch.ones(1)
    state = {"pruner.a.b": one, "model.pruner.c": one, "lm_head.weight": one}
    model, own = split_parts(state, "pruner")
    assert set(own) == {"a.b"}
    assert set(model) == {"model.pruner.c", "lm_head.weight"}
