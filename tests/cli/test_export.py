"""`itprune export`: any checkpoint becomes one ordinary folder, shards of real runs included."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import checkpoint as dcp
from transformers import AutoModelForImageTextToText, AutoProcessor

from itprune import load_pretrained, save_pretrained, shards
from itprune.checkpoint import PRUNER_WEIGHTS, PrunerRecord
from itprune.cli import main
from itprune.cli.new_folder import new_folder
from tests.test_launch import environment
from tests.train.helpers import recipe_values, write_data, write_recipe

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def export(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command; returns what it says when it refuses."""

    def run(folder: Path, output: Path, *options: str, status: int = 0) -> str:
        capfd.readouterr()
        words = ["export", "--model", str(folder), "--output", str(output), *options]
        assert main(words) == status
        said = capfd.readouterr().err
        if status:
            assert said.splitlines()[-1].startswith("itprune: error: ")
            assert not output.exists()
            assert not output.with_name(f"{output.name}.partial").exists()
        return said

    return run


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder."""
    return {k: v for path in folder.glob("model*.safetensors") for k, v in load_file(path).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ------------------------------------------------------------------------------ ordinary folders
def test_a_whole_model_in_bfloat16(
    export: Any, checkpoint: Path, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export(checkpoint, out)
    original = weights(checkpoint)
    assert same(weights(out), {k: v.bfloat16() for k, v in original.items()})
    assert PrunerRecord.read(out) == PrunerRecord.read(checkpoint)
    assert (out / "generation_config.json").exists()
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_pretrained(out, device="cpu").attached is not None
    AutoProcessor.from_pretrained(out)

    dense = tmp_path / "dense"
    export(checkpoint, dense, "--dense", "--dtype", "float32", "--max-shard-size", "100KB")
    assert same(weights(dense), original)
    assert len(list(dense.glob("*.safetensors"))) > 1
    assert load_pretrained(dense, device="cpu").attached is None
    assert (out / "README.md").exists()
    assert not (dense / "README.md").exists()
    _, info = AutoModelForImageTextToText.from_pretrained(dense, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_names_are_those_of_transformers_whatever_the_file_said(
    export: Any, checkpoint: Path, tmp_path: Path
) -> None:
    """As ZeRO-3 gathers a model: loadable, but under names nobody else knows."""
    odd = tmp_path / "odd"
    shutil.copytree(checkpoint, odd)
    doubled = {
        k.replace("language_model.model.", "language_model.model.model."): v
        for k, v in weights(checkpoint).items()
    }
    assert doubled.keys() != weights(checkpoint).keys()
    save_file(doubled, odd / "model.safetensors", {"format": "pt"})
    _, info = AutoModelForImageTextToText.from_pretrained(odd, output_loading_info=True)
    if info["missing_keys"]:
        pytest.skip("this transformers does not take these names")
    export(odd, tmp_path / "out", "--dtype", "float32")
    assert same(weights(tmp_path / "out"), weights(checkpoint))


def test_adapters_are_merged_in_float32_and_rounded_once(
    export: Any, base: Path, tmp_path: Path
) -> None:
    """On a base in bfloat16, as most are published: merged in it, small changes would be lost."""
    export(base, tmp_path / "half")
    loaded = load_pretrained(tmp_path / "half", device="cpu", dtype=torch.bfloat16)
    name = "model.language_model.layers.0.self_attn.q_proj"
    model = get_peft_model(loaded.model, LoraConfig(r=4, lora_alpha=4, target_modules=name))
    down, up = (p.data for n, p in model.named_parameters() if "lora_" in n)
    draw = torch.Generator().manual_seed(3)
    for part in (down, up):
        part.copy_(torch.randn(part.shape, generator=draw) * 0.2)
    expected = model.get_submodule(f"base_model.model.{name}.base_layer").weight.float()
    expected = (expected + up.float() @ down.float()).bfloat16()
    save_pretrained(tmp_path / "adapter", model, loaded.processor, None)
    export(tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(merged.get_submodule(name).weight, expected)


def test_what_it_refuses(
    export: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert "no such checkpoint" in export(tmp_path / "none", out, status=1)
    assert "500MB or 5GB" in export(checkpoint, out, "--max-shard-size", "5 apples", status=1)
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare)
    (bare / "model.safetensors").unlink()
    assert "neither weights" in export(bare, out, status=1)
    (bare / "latest").write_text("global_step1")
    assert "its shards cannot be read" in export(bare, out, status=1)
    monkeypatch.setattr(shards, "find_spec", lambda name: None)
    assert "needs the package deepspeed" in export(bare, out, status=1)
    (bare / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-9])
    assert "cannot be loaded" in export(bare, out, status=1)


def test_nothing_is_left_of_a_folder_that_failed(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "some").write_text("thing")
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    with pytest.raises(ValueError, match="No space left"), new_folder(out) as partial:
        fill(partial)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- pickles
class Harm:
    """Unpickling one would run a command."""

    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


def test_pickles_that_are_no_shards_are_refused_unread(
    export: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in ("deepspeed", "fsdp"):
        folder = tmp_path / kind
        shutil.copytree(checkpoint, folder)
        (folder / "model.safetensors").unlink()
        if kind == "deepspeed":
            (folder / "latest").write_text("global_step1")
            (folder / "global_step1").mkdir()
            torch.save({"a": Harm()}, folder / "global_step1/mp_rank_00_model_states.pt")
        else:
            (folder / shards.FSDP_FOLDER).mkdir()
            index = folder / shards.FSDP_FOLDER / shards.FSDP_INDEX
            index.write_bytes(pickle.dumps(Harm()))
        assert "system" in export(folder, tmp_path / "out", status=1)
    assert not (tmp_path / "harmed").exists()


def test_a_pattern_in_place_of_a_folder_of_shards_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, held in (("step[1]", {}), ("step1", Harm())):  # DeepSpeed would unpickle the second
        (tmp_path / name).mkdir()
        torch.save({"module": held}, tmp_path / name / "mp_rank_00_model_states.pt")
        torch.save({"optimizer_state_dict": held}, tmp_path / name / "zero_optim_states.pt")
    (tmp_path / shards.LATEST).write_text("step[1]")
    with pytest.raises(ValueError, match=r"is a pattern; rename the folder"):
        shards.read_shards(tmp_path)
    assert not (tmp_path / "harmed").exists()


class Reduced:
    """Pickles as a call of one's choice."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __call__(self) -> None:
        """What is called after unpickling must look so before."""

    def __reduce__(self) -> Any:
        return self.call


def test_enumerations_may_be_pickled_by_getattr_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11.0 to 3.11.3 pickle their members so; methods could be had in the same way."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    monkeypatch.chdir(tmp_path)
    file = tmp_path / "zero_optim_states.pt"
    torch.save({"zero_stage": Reduced(getattr, ZeroStageEnum, "weights")}, file)
    shards._look_through(file)
    torch.save({"zero_stage": Reduced(getattr, LossScaler, "update_scale")}, file)
    with pytest.raises(pickle.UnpicklingError, match="more than an enumeration"):
        shards._look_through(file)
    index = tmp_path / shards.FSDP_FOLDER / shards.FSDP_INDEX
    index.parent.mkdir()
    touch = Reduced(getattr, type(tmp_path), "touch")
    index.write_bytes(pickle.dumps(Reduced(touch, tmp_path / "harmed")))
    with pytest.raises(ValueError, match="more than an enumeration"):
        shards.read_shards(tmp_path)
    assert not (tmp_path / "harmed").exists()


# -------------------------------------------------------------------------- shards of a real run
def only_shards(folder: Path, to: Path) -> Path:
    """A copy without the weights that our own trainer puts beside the shards."""
    shutil.copytree(folder, to)
    for path in to.glob("*.safetensors"):
        path.unlink()
    return to


@pytest.mark.slow
def test_zero1_with_frozen_weights_and_a_trained_method(
    tiny_llava_folder: Path, export: Any, tmp_path: Path
) -> None:
    """`itprune train` in two processes under DeepSpeed, whose ZeRO-1 keeps frozen weights apart."""
    zero1 = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
    zero1 |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    (tmp_path / "zero1.json").write_text(json.dumps(zero1))
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options |= {"per_device_train_batch_size": 2, "deepspeed": str(tmp_path / "zero1.json")}
    data = write_data(tmp_path / "data", count=8)
    values = recipe_values(tiny_llava_folder, data, tmp_path / "run", **options)
    del values["lora"]
    values["model"]["mode"] = "full"
    values["prune"] = {"method": "quecc", "keep": 0.25}
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    command = [sys.executable, "-m", "itprune.cli", "train", str(recipe), "--nproc", "2"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 process(es) on cpu, DeepSpeed ZeRO-1" in done.stdout
    folder = tmp_path / "run/checkpoint-2"
    expected = tmp_path / "expected"
    export(folder, expected)
    bare = only_shards(folder, tmp_path / "bare")
    export(bare, tmp_path / "out")
    assert any("vision_tower" in name for name in weights(expected))
    assert same(weights(tmp_path / "out"), weights(expected))
    parts = [load_file(f / PRUNER_WEIGHTS) for f in (tmp_path / "out", folder)]
    assert same(*parts)

    # As a trainer leaves it that was told not to save what is frozen.
    file = bare / "global_step2/mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=True)
    state["module"] = {k: v for k, v in state["module"].items() if "vision_tower" not in k}
    torch.save(state, file)
    assert "they are taken from" in export(bare, tmp_path / "again")
    assert same(weights(tmp_path / "again"), weights(expected))
    values = yaml.safe_load((bare / "recipe.yaml").read_text())
    del values["model"]["path"]
    write_recipe(bare / "recipe.yaml", values)
    assert "names the base they are of" in export(bare, tmp_path / "none", status=1)
    (bare / "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    assert "Expected 2" in export(bare, tmp_path / "none", status=1)


# ---------------------------------------------------------------------------------------- FSDP
def write_fsdp(folder: Path, state: dict[str, Tensor]) -> None:
    """Weights as accelerate writes them for SHARDED_STATE_DICT."""
    dcp.save({"model": state}, checkpoint_id=folder / shards.FSDP_FOLDER, no_dist=True)


def test_fsdp_shards_of_a_whole_model(export: Any, checkpoint: Path, tmp_path: Path) -> None:
    bare = only_shards(checkpoint, tmp_path / "bare")
    write_fsdp(bare, load_pretrained(checkpoint, keep=1.0, device="cpu").model.state_dict())
    export(bare, tmp_path / "out", "--dtype", "float32")
    assert same(weights(tmp_path / "out"), weights(checkpoint))
    assert not list(tmp_path.glob(".merging-*"))


def test_fsdp_shards_of_adapters(export: Any, base: Path, tmp_path: Path) -> None:
    """Beside the empty file of adapters that other trainers leave."""
    loaded = load_pretrained(base, device="cpu")
    targets = r"model\.language_model\..*\.(q_proj|down_proj)"
    lora = LoraConfig(r=4, target_modules=targets, modules_to_save=["multi_modal_projector"])
    model = get_peft_model(loaded.model, lora)
    for weight in (p for p in model.parameters() if p.requires_grad):
        weight.data += 0.1
    whole = tmp_path / "whole"
    save_pretrained(whole, model, loaded.processor, None)
    export(whole, tmp_path / "expected")
    bare = only_shards(whole, tmp_path / "bare")
    write_fsdp(bare, load_file(whole / "adapter_model.safetensors"))
    save_file({}, bare / "adapter_model.safetensors")
    export(bare, tmp_path / "out")
    assert same(weights(tmp_path / "out"), weights(tmp_path / "expected"))
    assert not same(weights(tmp_path / "out"), {k: v.bfloat16() for k, v in weights(base).items()})
