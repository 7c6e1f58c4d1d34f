"""docs/drop-in.md with transformers' Trainer, a plain loop and accelerate: the page's own programs,
and what they leave behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import set_seed

from itprune import PrunerCallback, load_pretrained
from itprune.checkpoint import PrunerRecord
from itprune.cli import main
from tests.dropin.page import SAMPLES, TWO, blocks, prepare, run
from tests.train.helpers import losses, recipe_values, write_recipe
from train.launcher import Launch
from train.recipe.config import load_recipe
from train.run import run as run_recipe

pytestmark = pytest.mark.xdist_group("drop_in")
TRAINER, TRL, LOOP = "transformers' Trainer", "TRL's SFTTrainer", "A loop of your own"
SHARES = {"keep", "kept_stage1", "kept_stage2", "kept_average"}
ALONE = Launch(processes=1, rank=0, by_deepspeed=False, accelerate_deepspeed=False)
QUIET = {'report_to="tensorboard"': 'report_to="none"'}
PLAIN = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
model, info = AutoModelForImageTextToText.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
AutoProcessor.from_pretrained(sys.argv[1])
inputs = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model.eval()(**inputs).logits, sys.argv[2])
assert not [name for name in sys.modules if name.startswith("itprune")]
"""


@pytest.fixture(scope="module")
def place(tiny_llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which the page's programs run."""
    folder = prepare(tmp_path_factory.mktemp("drop_in"), tiny_llava_folder)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def trained(place: Path) -> dict[str, Any]:
    """The Trainer's program, run."""
    set_seed(42)  # adapters start from random numbers
    return run(TRAINER)


def again(name: str, resume: str | None = None, **replaced: str) -> dict[str, Any]:
    """The Trainer's program with another output folder; it may go on from a checkpoint in it."""
    replaced |= {"outputs/trainer": name, **QUIET}
    if resume is not None:
        replaced["trainer.train()"] = f"trainer.train(resume_from_checkpoint={resume})"
    set_seed(42)
    return run(TRAINER, **replaced)


def scheduled(keep: str) -> dict[str, str]:
    """What to replace for a `keep` that moves."""
    attached = "from itprune import Schedule\nattached = attach("
    return {"PruneConfig(keep=0.22)": f"PruneConfig(keep={keep})", "attached = attach(": attached}


def logged(names: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]


@torch.no_grad()
def logits(model: Any, names: dict[str, Any]) -> torch.Tensor:
    """What a model says about the page's first two samples."""
    inputs = names["collate"](names["records"][:2])
    del inputs["labels"]
    return model.eval()(**inputs).logits


def test_the_two_statements_are_in_the_programs() -> None:
    for heading in (TRAINER, TRL):
        assert TWO in blocks(heading)[0]


# ---------------------------------------------------------------------------------------- Trainer
def test_the_curve_is_that_of_our_own_training(trained: dict[str, Any], place: Path) -> None:
    """Another collator, another data format and another trainer, but the same batches."""
    values = recipe_values(place / "llava-1.5-7b-hf", place / "train.json", place / "recipe")
    values["lora"] = {"r": 8, "alpha": 16, "target": ["q_proj", "v_proj"]}
    values["prune"] = {"keep": 0.22}
    values["trainer"] |= {"per_device_train_batch_size": 2, "learning_rate": 1e-4}
    run_recipe(load_recipe(write_recipe(place / "recipe.yaml", values), []), ALONE)
    assert logged(trained) == pytest.approx(losses(place / "recipe"), abs=1e-5)


def test_shares_stand_beside_the_loss(trained: dict[str, Any], place: Path) -> None:
    for entry in trained["trainer"].state.log_history[:-1]:
        assert set(entry) >= SHARES
        assert entry["keep"] == 0.22
        assert entry["kept_stage2"] <= entry["kept_average"] <= entry["kept_stage1"] < 1
    (events,) = (place / "outputs/trainer/runs").rglob("events*")
    found = EventAccumulator(str(events)).Reload()
    assert {f"train/{name}" for name in SHARES} < set(found.Tags()["scalars"])


@pytest.mark.parametrize("folder", ["outputs/trainer", "outputs/trainer/checkpoint-4"])
def test_every_folder_loads_with_its_pruner(folder: str, trained: dict[str, Any]) -> None:
    loaded = load_pretrained(folder)
    assert loaded.attached is not None
    assert loaded.attached.calibration == trained["attached"].calibration
    assert loaded.attached.calibration.samples == SAMPLES
    expected = logits(trained["model"], trained)
    assert torch.allclose(logits(loaded.model, trained), expected, atol=1e-6)
    assert loaded.attached.report.drops == trained["attached"].report.drops


def test_infer_answers(trained: dict[str, Any], place: Path, capsys: Any) -> None:
    words = ["--image", "images/0.png", "--prompt", "What colour?", "--max-new-tokens", "3"]
    words = ["infer", "--model", "outputs/trainer/checkpoint-2", *words, "--device", "cpu"]
    assert main(words) == 0
    assert capsys.readouterr().out.strip()


def test_a_merged_folder_is_one_of_plain_transformers(trained: dict[str, Any], place: Path) -> None:
    assert main(["merge", "--model", "outputs/trainer", "--output", "outputs/merged"]) == 0
    inputs = trained["collate"](trained["records"][:2])
    del inputs["labels"]
    torch.save(dict(inputs), place / "inputs.pt")
    words = [sys.executable, "-c", PLAIN, "outputs/merged", "inputs.pt"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    dense = torch.load(place / "inputs.pt")
    assert torch.allclose(
        dense, logits(load_pretrained("outputs/merged", keep=1.0).model, trained), atol=1e-6
    )
    pruned = load_pretrained("outputs/merged")
    assert torch.allclose(
        logits(pruned.model, trained), logits(trained["model"], trained), atol=1e-5
    )
    assert pruned.attached is not None


def test_the_card_states_method_budget_and_kept_tokens(trained: dict[str, Any]) -> None:
    card = Path("outputs/trainer/README.md").read_text()
    assert "- itprune\n" in card
    assert "library_name: peft\n" in card
    for said in ("| method | `itprune` |", "| 0.22 |", f"of {SAMPLES} samples", "Calibrated on"):
        assert said in card


def test_a_run_goes_on_with_the_same_draws(trained: dict[str, Any], place: Path) -> None:
    drawn = {"keep=0.22": "keep=[0.3, 0.6, 1.0]", "learning_rate=1e-4": "learning_rate=1e-2"}
    whole = again("outputs/drawn", **drawn)
    keeps = [entry["keep"] for entry in whole["trainer"].state.log_history[:-1]]
    assert len(set(keeps)) > 1
    assert whole["attached"].keep == 0.3  # the first one holds after the training
    shutil.rmtree("outputs/drawn/checkpoint-4")
    rest = again("outputs/drawn", resume="True", **drawn)
    assert logged(rest) == logged(whole)
    assert rest["attached"].calibration == whole["attached"].calibration


@pytest.mark.parametrize("method", ["keep=0.4", 'method="quecc", keep=0.25'])
def test_full_tuning_goes_on_from_the_weights_of_its_checkpoint(
    method: str, trained: dict[str, Any]
) -> None:
    """A Trainer by itself would go on from the untrained ones: the file has other names."""
    name = f"outputs/full_{len(method)}"
    full = {"keep=0.22": method, "get_peft_model(model, lora)": "model"}
    whole = again(name, **full)
    shutil.rmtree(f"{name}/checkpoint-4")
    rest = again(name, resume=f"'{name}/checkpoint-2'", **full)
    assert logged(rest) == logged(whole)
    loaded = load_pretrained(name)
    expected = logits(rest["model"], rest)
    assert torch.allclose(logits(loaded.model, rest), expected, atol=1e-6)
    shutil.move(f"{name}/checkpoint-2", f"{name}_moved/checkpoint-2")
    with pytest.warns(UserWarning, match="resume from a checkpoint in `output_dir`"):
        again(name, resume=f"'{name}_moved/checkpoint-2'", **full)


def test_trained_parts_are_saved_with_adapters(trained: dict[str, Any]) -> None:
    parts = {"keep=0.22": 'method="quecc", keep=0.25', "learning_rate=1e-4": "learning_rate=1e-2"}
    names = again("outputs/parts", **parts)
    loaded = load_pretrained("outputs/parts/checkpoint-4")
    live = names["attached"].method.state_dict()
    saved = loaded.attached.method.state_dict()
    assert live.keys() == saved.keys()
    assert all(torch.equal(live[name], saved[name]) for name in live)
    assert torch.allclose(
        logits(loaded.model, names), logits(names["trainer"].model, names), atol=1e-6
    )


def test_added_as_any_callback_it_does_the_same_but_for_other_reports(
    trained: dict[str, Any],
) -> None:
    usual = {
        "PrunerCallback(attached, processor).add_to(trainer)": (
            "callback = PrunerCallback(attached, processor, calibration_samples=0)\n"
            "trainer.add_callback(callback)"
        )
    }
    names = again("outputs/usual", **usual)
    assert set(names["trainer"].state.log_history[0]) >= SHARES
    assert PrunerRecord.read(Path("outputs/usual/checkpoint-4")).calibration is None
    names["trainer"].save_model("outputs/elsewhere")
    names["callback"].save("outputs/elsewhere")
    assert "Not calibrated" in Path("outputs/elsewhere/README.md").read_text()
    assert load_pretrained("outputs/elsewhere").attached.keep == 0.22


def test_a_log_tells_of_the_steps_since_the_last_one(trained: dict[str, Any]) -> None:
    """Steps that prune, then steps that do not: nothing of the first is in the second's shares."""
    names = again("outputs/rising", **scheduled("Schedule(1.0, 0.22, until=0.25)"))
    first, *others = [e for e in names["trainer"].state.log_history if "loss" in e]
    assert first["kept_stage2"] < 1
    assert others
    assert all("kept_stage2" not in entry for entry in others)


def test_what_is_calibrated_is_the_target_after_training(trained: dict[str, Any]) -> None:
    names = again("outputs/falling", **scheduled("Schedule(0.22)"))
    assert names["attached"].calibration.samples == SAMPLES
    assert names["attached"].keep == 0.22


def test_a_stream_trains_uncalibrated_and_says_so(place: Path) -> None:
    stream = {
        "train_dataset=records": "train_dataset=stream",
        "num_train_epochs=1": "max_steps=2",
        "from transformers import Trainer, TrainingArguments\n": (
            "from datasets import IterableDataset\n"
            "from transformers import Trainer, TrainingArguments\n"
            "stream = IterableDataset.from_generator(lambda: iter(records))\n"
        ),
    }
    with pytest.warns(UserWarning, match="a stream is not calibrated on"):
        names = again("outputs/stream", **stream)
    assert names["attached"].calibration is None
    assert set(names["trainer"].state.log_history[0]) >= SHARES


def test_several_gpus_in_one_process_are_refused(trained: dict[str, Any]) -> None:
    callback = PrunerCallback(trained["attached"])
    with pytest.raises(ValueError, match="accelerate launch"):
        callback.on_train_begin(SimpleNamespace(n_gpu=2), None, None)


# ---------------------------------------------------------------------------------------- loops
def test_the_loop_draws_and_leaves_a_folder_to_load(place: Path, capsys: Any) -> None:
    set_seed(0)
    names = run(LOOP)
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step")]
    assert len(steps) == SAMPLES // 2
    assert all(" keep 0.22," in s or " keep 0.5," in s or " keep 1.0," in s for s in steps)
    names["attached"].set_keep(0.22)
    loaded = load_pretrained("outputs/loop")
    assert loaded.attached.keep == 0.22
    assert torch.allclose(logits(loaded.model, names), logits(names["model"], names), atol=1e-6)


def test_accelerate_prunes_and_leaves_a_folder_to_load(place: Path) -> None:
    set_seed(0)
    names = run("accelerate")
    kept = names["attached"].totals
    assert 0 < kept.visual_stage1 < kept.visual_in == SAMPLES * 16
    loaded = load_pretrained("outputs/accelerate")
    assert torch.allclose(logits(loaded.model, names), logits(names["model"], names), atol=1e-6)


def test_what_comes_out(trained: dict[str, Any]) -> None:
    names = run("What comes out")
    assert names["loaded"].attached.keep == 0.22
    assert names["dense"].attached.keep == 1.0
    state = json.loads(Path("outputs/trainer/checkpoint-2/trainer_state.json").read_text())
    assert state["global_step"] == 2
