"""Whole runs in this process: logged numbers, folders, resuming, bad samples, accumulation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from itprune import checkpoint
from itprune.engine.patches import PatchPass
from tests.train.helpers import (
    history,
    losses,
    recipe_values,
    turn,
    write_data,
    write_recipe,
)
from train.launcher import Launch
from train.recipe.config import load_recipe
from train.run import run

ALONE = Launch(processes=1, rank=0, by_deepspeed=False, accelerate_deepspeed=False)
SHARES = {"kept_stage1", "kept_stage2", "layer_average", "keep"}


@pytest.fixture
def train(tiny_llava_folder: Path, tmp_path: Path) -> Any:
    """Runs a recipe made of the small one and some overrides; returns the output folder."""
    data = write_data(tmp_path / "data")

    def start(*overrides: str, name: str = "out", resume: bool = False) -> Path:
        values = recipe_values(tiny_llava_folder, data, tmp_path / name)
        recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", values), overrides)
        run(recipe, ALONE, resume)
        return recipe.output

    return start


def test_a_dense_run_logs_and_leaves_a_folder_to_load(train: Any) -> None:
    output = train()
    steps = history(output)
    assert len(steps) == 4
    assert all(
        {"tokens_in", "tokens_per_s", "step_time", "peak_mb", "bad_samples"} <= set(step)
        for step in steps
    )
    assert steps[0]["layer_average"] == 1.0
    assert not SHARES & set(steps[0]) - {"layer_average"}
    assert not (output / "pruner.json").exists()
    assert load_recipe(output / "recipe.yaml").trainer["max_steps"] == 4


def test_a_pruned_run_logs_what_was_kept_and_saves_the_pruner(train: Any) -> None:
    output = train("prune.keep=0.4", "trainer.save_strategy=steps", "trainer.save_steps=2")
    steps = history(output)
    for step in steps:
        assert set(step) >= SHARES
        assert step["keep"] == 0.4
        assert 0 < step["kept_stage2"] <= step["kept_stage1"] < 1
        assert 0 < step["layer_average"] < 1
    for folder in (output, output / "checkpoint-2", output / "checkpoint-4"):
        names = {path.name for path in folder.iterdir()}
        assert names >= {
            "adapter_config.json",
            "adapter_model.safetensors",
            "pruner.json",
            "recipe.yaml",
            "tokenizer.json",
            "processor_config.json",
        }
        assert not any(name.endswith(".bin") and "training_args" not in name for name in names)
    loaded = checkpoint.load_pretrained(output)
    assert loaded.attached is not None
    assert loaded.attached.keep == 0.4
    assert loaded.attached.calibration is not None


def test_keep_follows_its_schedule(train: Any) -> None:
    keeps = [step["keep"] for step in history(train("prune.keep={from: 1.0, to: 0.2, until: 0.5}"))]
    assert keeps == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_keep_one_is_the_dense_run(train: Any) -> None:
    assert losses(train("prune.keep=1.0", name="whole")) == losses(train(name="dense"))


@pytest.mark.parametrize("prune", [(), ("prune.keep=0.4",)], ids=["dense", "pruned"])
def test_accumulation_gives_the_same_curve_with_uneven_answers(train: Any, prune: Any) -> None:
    once = train(*prune, "trainer.max_grad_norm=0.1", name="once")
    parts = train(
        *prune,
        "trainer.max_grad_norm=0.1",
        "trainer.per_device_train_batch_size=1",
        "trainer.gradient_accumulation_steps=4",
        name="parts",
    )
    assert losses(parts) == pytest.approx(losses(once), abs=1e-4)
    counts = [[step["tokens_in"] for step in history(output)] for output in (once, parts)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("prune", [(), ("prune.keep=0.4",)], ids=["dense", "pruned"])
@pytest.mark.parametrize(
    "mode",
    [
        ("lora.dropout=0.2",),
        ("model.mode=full", "lora=null"),
        ("model.mode=projector", "lora=null", "trainer.bf16=true"),
    ],
    ids=["lora", "full", "projector"],
)
def test_a_resumed_run_has_the_same_curve(train: Any, mode: Any, prune: Any) -> None:
    options = (*prune, *mode, "trainer.max_steps=9", "trainer.save_strategy=steps",
               "trainer.save_steps=4")  # fmt: skip
    whole = train(*options, name="whole")
    expected = losses(whole)
    shutil.rmtree(whole / "checkpoint-9")
    shutil.rmtree(whole / "checkpoint-8")
    # A run that died while it was saving leaves a folder with half of the trainer's state.
    shutil.copytree(whole / "checkpoint-4", whole / "checkpoint-8")
    (whole / "checkpoint-8/trainer_state.json").write_text('{"global_step": 8')
    assert losses(train(*options, name="whole")) == expected


def test_resuming_wants_the_same_experiment(train: Any) -> None:
    save = ("trainer.save_strategy=steps", "trainer.save_steps=2")
    with pytest.raises(ValueError, match=r"--resume: no complete checkpoint in"):
        train(resume=True)
    train(*save)
    with pytest.raises(ValueError, match=r"is of another run: lora.r was 4 and is 8"):
        train(*save, "lora.r=8")
    with pytest.raises(ValueError, match=r"prune was None and is"):
        train(*save, "prune.keep=0.5")
    assert len(history(train(*save, "trainer.max_steps=5", resume=True))) == 5
    train(name="finished")
    with pytest.raises(ValueError, match=r"finished is of another run: lora.r was 4 and is 8"):
        train("lora.r=8", name="finished")


def test_evaluation_loss_is_logged_beside(train: Any, tmp_path: Path) -> None:
    val = write_data(tmp_path / "val", 6, seed=5)
    output = train(
        f"data.val={val}", "trainer.eval_strategy=steps", "trainer.eval_steps=2", "prune.keep=0.4"
    )
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [2, 4]
    assert history(output)[2]["kept_stage1"] < 1


def test_bad_samples_are_skipped_reported_and_counted(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data/train.json"
    records = json.loads(data.read_text())
    records[1] |= {"image": "images/none.png"}
    records[2] |= {"conversations": [turn("human", "<image> <image>"), turn("gpt", "a")]}
    data.write_text(json.dumps(records))
    options = ("data.max_bad=0.1", "trainer.max_steps=6")
    output = train(*options)
    assert history(output)[-1]["bad_samples"] == 2
    report = [json.loads(line) for line in (output / "bad_samples.jsonl").open()]
    assert sorted(entry["where"] for entry in report) == [f"{data}, record {i}" for i in (1, 2)]
    assert "missing image" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"data.max_bad: \d+ of 24 samples are bad, 0 are allowed"):
        train("trainer.max_steps=6", name="strict")
    assert (tmp_path / "strict/bad_samples.jsonl").read_text().count("\n") >= 1


def test_a_wrong_folder_of_images_is_named_before_the_first_step(
    train: Any, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    wrong = tmp_path / "elsewhere"
    with pytest.raises(ValueError, match=r"calibration needs .* the first, .*missing image") as e:
        train(f"data.image_root={wrong}", "data.max_bad=0.9", "prune.keep=0.4")
    assert str(wrong) in str(e.value)


@pytest.mark.parametrize("mode", ["full", "projector"])
def test_the_other_modes_train_what_they_should(
    train: Any, tiny_llava_folder: Path, mode: str
) -> None:
    output = train(f"model.mode={mode}", "lora=null", "prune.keep=0.4", "trainer.max_steps=2")
    before = checkpoint.load_pretrained(tiny_llava_folder).model.state_dict()
    after = checkpoint.load_pretrained(output).model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("multi_modal_projector" in name for name in moved)
    assert not any("vision_tower" in name for name in moved)
    assert any("language_model" in name for name in moved) == (mode == "full")


def test_gradient_checkpointing_changes_nothing(train: Any) -> None:
    plain = train("prune.keep=0.4", name="plain")
    checkpointed = train("prune.keep=0.4", "trainer.gradient_checkpointing=true", name="ckpt")
    assert losses(checkpointed) == pytest.approx(losses(plain), abs=1e-5)


def test_checkpointing_does_not_train_through_the_frozen_tower(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    shorten = PatchPass.shorten

    def look(self: PatchPass, features: torch.Tensor, method: Any) -> torch.Tensor:
        asked.append(features.requires_grad)
        return shorten(self, features, method)

    monkeypatch.setattr(PatchPass, "shorten", look)
    train("prune.keep=0.4", "trainer.gradient_checkpointing=true", "trainer.max_steps=2")
    assert asked
    assert not any(asked)
