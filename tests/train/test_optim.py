"""Learning rates by part: groups, what moves, what is logged, 8-bit and paged optimizers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.helpers import history, losses, train_here, write_data
from train.optim import check_deepspeed, check_optimizer

FULL = ("model.mode=full", "lora=null", "model.freeze=[]")
SAVE = ("trainer.save_strategy=steps", "trainer.save_steps=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def train(tiny_llava_folder: Path, data: Path, tmp_path: Path) -> Any:
    def start(*overrides: str, name: str = "out") -> Path:
        return train_here(tiny_llava_folder, data, tmp_path / name, *overrides)

    return start


def state_of(output: Path) -> Any:
    return torch.load(output / "checkpoint-4/optimizer.pt", weights_only=True)


def first_moment(state: dict[str, Any]) -> torch.Tensor:
    """bitsandbytes saves what it keeps in 8 bits one level down."""
    return {**state, **state.get("__bnb_optimizer_quant_state__", {})}["state1"]


def moved(output: Path, base: Path) -> set[str]:
    """The parts whose saved weights are not the base model's."""
    before, after = (load_file(folder / "model.safetensors") for folder in (base, output))
    kinds = {"vision_tower": "vision", "multi_modal_projector": "projector"}
    return {
        next((part for kind, part in kinds.items() if kind in name), "language")
        for name in before
        if not torch.equal(before[name], after[name])
    }


def test_groups_are_parts_by_decay_and_the_usual_rate_comes_first(train: Any) -> None:
    rates = "model.learning_rates={vision: 1e-5, projector: 1e-4}"
    output = train(*FULL, *SAVE, rates, "trainer.weight_decay=0.1", "trainer.max_grad_norm=1")
    plain = train(*FULL, *SAVE, "trainer.weight_decay=0.1", name="plain")
    groups, usual = (state_of(folder)["param_groups"] for folder in (output, plain))
    kinds = [(g["part"], g["initial_lr"], g["weight_decay"]) for g in groups]
    assert sorted(kinds[:2]) == [("language", 1e-3, 0.0), ("language", 1e-3, 0.1)]
    assert sorted(kinds[2:]) == [
        ("projector", 1e-4, 0.0),
        ("projector", 1e-4, 0.1),
        ("vision", 1e-5, 0.0),
        ("vision", 1e-5, 0.1),
    ]
    for decay in (0.0, 0.1):
        counts = [
            sum(len(g["params"]) for g in found if g["weight_decay"] == decay)
            for found in (groups, usual)
        ]
        assert counts[0] == counts[1] > 0


def test_every_part_has_the_logged_rate_of_its_step(train: Any) -> None:
    steps = history(train("prune.keep=0.4", "model.learning_rates={projector: 2e-3}"))
    for i, step in enumerate(steps):
        assert step["learning_rate"] == pytest.approx(1e-3 * (1 - i / 4))
        assert step["learning_rate/language"] == step["learning_rate"]
        assert step["learning_rate/projector"] == pytest.approx(2 * step["learning_rate"])
    assert not any("/" in name for name in history(train(name="plain"))[0])


def test_one_rate_named_for_all_is_the_usual_run(train: Any) -> None:
    plain = losses(train(*FULL, name="plain"))
    named = "model.learning_rates={language: 1e-3, projector: 1e-3, vision: 1e-3}"
    assert losses(train(*FULL, named)) == plain
    assert losses(train(*FULL, "model.learning_rates.projector=1e-2", name="faster")) != plain


@pytest.mark.parametrize("still", ["vision", "projector", "language"])
def test_a_rate_of_zero_keeps_a_part_and_freezing_it_does(
    train: Any, tiny_llava_folder: Path, still: str
) -> None:
    others = {"vision", "projector", "language"} - {still}
    for i, option in enumerate((f"model.learning_rates.{still}=0", f"model.freeze=[{still}]")):
        output = train(*FULL, option, "trainer.max_steps=2", name=str(i))
        assert moved(output, tiny_llava_folder) == others


def test_the_pruner_has_a_rate_of_its_own(train: Any) -> None:
    quecc = ("prune.method=quecc", "prune.keep=0.25", "trainer.max_steps=2")
    output = train(*quecc, "model.learning_rates={pruner: 5e-3}")
    assert history(output)[0]["learning_rate/pruner"] == pytest.approx(5e-3)
    still = train(*quecc, "model.learning_rates={pruner: 0}", name="still")
    (started,) = (train(*quecc, "trainer.learning_rate=0", name="none"),)
    parts = [load_file(f / "pruner.safetensors") for f in (output, still, started)]
    assert all(torch.equal(parts[1][n], parts[2][n]) for n in parts[1])
    assert not all(torch.equal(parts[0][n], parts[2][n]) for n in parts[0])


@pytest.mark.parametrize(
    "options",
    [
        ("model.learning_rates={vision: 1e-5}",),
        ("lora.train_projector=false", "model.learning_rates={projector: 1e-5}"),
        ("prune.keep=0.4", "model.learning_rates={pruner: 1e-5}"),
        ("model.mode=full", "lora=null", "model.learning_rates={vision: 1e-5}"),
    ],
)
def test_a_rate_for_what_does_not_train_is_refused(train: Any, options: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"model.learning_rates.\w+: nothing of this part trains"):
        train(*options)


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_small_and_paged_optimizers_resume_to_the_same_curve(train: Any, name: str) -> None:
    options = (*FULL, *SAVE, f"trainer.optim={name}", "model.learning_rates={projector: 2e-3}")
    whole = train(*options)
    expected, held = losses(whole), [first_moment(s) for s in state_of(whole)["state"].values()]
    states = [moment.dtype for moment in held if moment.numel() > 8192]
    # Of these only the embeddings are kept in full, as transformers has it.
    assert states.count(torch.float32) == (len(states) if "32bit" in name else 1)
    shutil.rmtree(whole / "checkpoint-4")
    assert losses(train(*options)) == expected
    assert expected == pytest.approx(
        losses(train(*options[:3], options[-1], name="usual")), abs=0.02
    )


def test_an_optimizer_that_is_not_installed_is_one_sentence(train: Any) -> None:
    for rates in ((), ("model.learning_rates.language=1e-4",)):
        with pytest.raises(ValueError, match=r"^trainer.optim: .*pip install lomo-optim"):
            train("trainer.optim=lomo", *rates)


def test_a_schedule_with_a_floor_moves_all_groups_alike(train: Any) -> None:
    floor = ("trainer.lr_scheduler_type=cosine_with_min_lr", "model.learning_rates.projector=1e-2")
    steps = history(train(*floor, "trainer.lr_scheduler_kwargs={min_lr: 1e-4}"))
    for step in steps:
        assert step["learning_rate/projector"] == pytest.approx(10 * step["learning_rate"])
    assert steps[-1]["learning_rate"] < steps[0]["learning_rate"] == pytest.approx(1e-3)


def test_optimizers_that_group_by_themselves_are_refused() -> None:
    check_optimizer(torch.optim.AdamW, {"lr", "betas"}, "adamw_torch")
    for kind, options in ((torch.optim.AdamW, {"params"}), (object, {"lr"})):
        with pytest.raises(
            ValueError, match=r"^trainer.optim: its_name divides the weights itself"
        ):
            check_optimizer(kind, options, "its_name")
    check_deepspeed({"zero_optimization": {"stage": 2}})
    with pytest.raises(ValueError, match=r"^model.learning_rates: the DeepSpeed file"):
        check_deepspeed({"optimizer": {"type": "AdamW"}})
