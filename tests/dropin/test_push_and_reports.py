"""launch/train.py pushes to a hub and reports to wandb and TensorBoard: what one run wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.dropin.hub import Hub, loopback_hub
from tests.dropin.wandb_file import history as wandb_history
from tests.train.helpers import history, recipe_values, write_data, write_recipe
from train import reports
from train.launcher import Launch
from train.recipe.config import load_recipe
from train.run import run

ROOT = Path(__file__).parents[2]
TOKEN = "hf_neverPrintedNeverWritten"
ALONE = Launch(processes=1, rank=0, by_deepspeed=False, accelerate_deepspeed=False)
LOGGED = ("loss", "kept_stage1", "kept_stage2", "keep", "layer_average", "tokens_in")
slow = pytest.mark.slow
pytestmark = pytest.mark.xdist_group("push")


@pytest.fixture(scope="module")
def pushed(
    tiny_llava_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Hub, Path, str]:
    """A small run that pushes and reports: the hub, its folder, what it printed."""
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    place = tmp_path_factory.mktemp("push")
    data = write_data(place / "data", count=12)
    values = recipe_values(tiny_llava_folder, data, place / "out", max_steps=2)
    values["data"]["val"] = str(data)
    values["prune"] = {"keep": 0.4}
    values["trainer"] |= {
        "report_to": ["tensorboard", "wandb"],
        "eval_strategy": "steps",
        "eval_steps": 2,
        "push_to_hub": True,
        "hub_model_id": "someone/tiny-pruned",
    }
    with loopback_hub() as hub:
        own = {
            "HF_ENDPOINT": hub.address,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(place / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            "WANDB_MODE": "offline",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        left = {name: value for name, value in os.environ.items() if "WANDB" not in name}
        done = subprocess.run(
            [sys.executable, "launch/train.py", str(write_recipe(place / "r.yaml", values))],
            cwd=ROOT,
            env={**left, **own},
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return hub, place / "out", done.stdout + done.stderr


@slow
def test_the_hub_gets_a_folder_to_load(pushed: Any) -> None:
    hub, output, _ = pushed
    wanted = {"README.md", "pruner.json", "recipe.yaml", "adapter_model.safetensors"}
    assert wanted | {"adapter_config.json", "processor_config.json"} <= set(hub.files)
    for name in wanted - {"README.md"}:
        assert hub.files[name] == (output / name).read_bytes()
    assert not [name for name in hub.files if name.startswith(("checkpoint-", "_logs"))]


@slow
def test_its_card_is_ours(pushed: Any) -> None:
    hub, output, _ = pushed
    card = hub.files["README.md"].decode()
    _, head, text = card.split("---\n", 2)
    data = yaml.safe_load(head)
    assert data["library_name"] == "peft"
    assert data["license"] == "unknown"
    assert data["tags"] == ["itprune", "token-pruning"]
    assert "base_model" not in data  # a folder; the hub refuses paths
    assert "# tiny-pruned" in text
    for said in ("| 0.4 |", "samples (evaluation)", "| eval_loss |", "## Recipe", "| mean |"):
        assert said in text, said
    assert card == (output / "README.md").read_text()


@slow
def test_the_token_is_shown_to_the_hub_alone(pushed: Any) -> None:
    hub, output, printed = pushed
    assert f"Bearer {TOKEN}" in hub.tokens
    assert TOKEN not in printed
    for path in output.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


@slow
def test_wandb_and_tensorboard_have_every_number_in_the_output_folder(pushed: Any) -> None:
    _, output, _ = pushed
    (file,) = (output / "_logs/wandb").glob("offline-run-*/*.wandb")
    steps = [row for row in wandb_history(file) if "train/loss" in row]
    (events,) = (output / "runs").rglob("events*")
    scalars = EventAccumulator(str(events)).Reload()
    for name in LOGGED:
        expected = pytest.approx([entry[name] for entry in history(output)], abs=1e-6)
        assert [step[f"train/{name}"] for step in steps] == expected
        assert [point.value for point in scalars.Scalars(f"train/{name}")] == expected


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio conflicts with pinned pillow")
def test_trackio_writes_into_the_output_folder(
    tiny_llava_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """trackio 0.43 needs another pillow than constraints.txt names, so the suite has it not.

    It reads its variable when it is imported, which a run does late.
    """
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    data = write_data(tmp_path / "data", count=4)
    values = recipe_values(tiny_llava_folder, data, tmp_path / "out", max_steps=1)
    values["trainer"] |= {"report_to": "trackio"}
    run(load_recipe(write_recipe(tmp_path / "r.yaml", values), []), ALONE)
    assert list((tmp_path / "out/_logs/trackio").glob("*.db"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=rf"report_to: {name} needs .*`pip install {name}`"):
        reports.prepare_reports(SimpleNamespace(report_to=[name], output_dir="out"))


def test_an_unknown_report_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown name 'wandbb'; choose from: .*wandb"):
        reports.prepare_reports(SimpleNamespace(report_to=["wandbb"], output_dir="out"))


def test_a_folder_of_logs_that_is_named_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    monkeypatch.setattr(reports, "find_spec", lambda package: object())
    reports.prepare_reports(SimpleNamespace(report_to=["wandb"], output_dir=str(tmp_path)))
    assert os.environ["WANDB_DIR"] == "elsewhere"


def test_a_token_in_a_recipe_is_refused(tiny_llava_folder: Path, tmp_path: Path) -> None:
    """It would be written beside every checkpoint."""
    values = recipe_values(tiny_llava_folder, tmp_path / "data.json", tmp_path / "out")
    values["trainer"] |= {"hub_token": TOKEN}
    with pytest.raises(ValueError, match=r"trainer\.hub_token: .*HF_TOKEN") as error:
        load_recipe(write_recipe(tmp_path / "r.yaml", values), [])
    assert TOKEN not in str(error.value)
