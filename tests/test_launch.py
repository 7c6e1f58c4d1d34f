"""launch/train.py and who starts it; what it trains under each launcher is in tests/distributed."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.distributed.starting import environment
from tests.train.helpers import losses, recipe_values, write_data, write_recipe
from train.launcher import Launch, check_world, deepspeed_config, read_launch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "launch/train.py"
PRUNED = ("prune.keep=0.4",)


def call(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


# ------------------------------------------------------------------------------ without launchers
@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch_train", ROOT / SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_help_explains(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        script.main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "section.key=value" in text
    assert "--resume" in text


def test_check_prints_the_resolved_recipe(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(ROOT / "configs/quickstart.yaml")
    assert script.main(["--local_rank=0", config, "prune.keep=0.5", "--check"]) == 0
    assert "keep: 0.5" in capsys.readouterr().out
    assert script.main([config, "prune.kepe=0.5", "--check"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_the_launchers_are_told_apart() -> None:
    two = {"RANK": "1", "WORLD_SIZE": "2"}
    assert read_launch(None, {}) == Launch(1, 0, False, False)
    assert read_launch(0, two) == Launch(2, 1, True, False)
    assert read_launch(None, {**two, "CROSS_SIZE": "1"}).by_deepspeed
    assert not read_launch(None, two).by_deepspeed
    assert read_launch(None, {**two, "ACCELERATE_USE_DEEPSPEED": "true"}).accelerate_deepspeed
    fsdp = {**two, "ACCELERATE_USE_FSDP": "true"}
    assert read_launch(None, two).accelerate_fsdp is None
    assert read_launch(None, fsdp).accelerate_fsdp == "1"
    assert read_launch(None, {**fsdp, "FSDP_VERSION": "2"}).accelerate_fsdp == "2"
    with pytest.raises(ValueError, match="asked for several processes but started only one"):
        read_launch(None, {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"})


def test_who_runs_deepspeed() -> None:
    alone, by_it = Launch(1, 0, False, False), Launch(1, 0, True, False)
    named = {"deepspeed": "launch/deepspeed/zero3.json"}
    assert deepspeed_config({}, alone) is None
    assert deepspeed_config(named, alone) is None
    assert str(deepspeed_config({}, by_it)).endswith("zero2.json")
    assert str(deepspeed_config(named, by_it)).endswith("zero3.json")
    assert deepspeed_config({"deepspeed": {"a": 1}}, by_it) == {"a": 1}
    with pytest.raises(ValueError, match="no such file: none"):
        deepspeed_config({"deepspeed": "none.json"}, by_it)
    with pytest.raises(ValueError, match="in one place only"):
        deepspeed_config(named, Launch(2, 0, False, True))
    with pytest.raises(ValueError, match=r"trainer.deepspeed: .* asks for FSDP.*deepspeed=null"):
        deepspeed_config(named, Launch(2, 0, False, False, accelerate_fsdp="2"))
    assert deepspeed_config({}, Launch(2, 0, False, False, accelerate_fsdp="2")) is None


def test_processes_that_do_not_know_of_each_other_are_refused() -> None:
    class Args:
        world_size = 1
        n_gpu = 1

    class SeveralGpus:
        world_size = 1
        n_gpu = 4

    check_world(Args, Launch(1, 0, False, False))
    with pytest.raises(ValueError, match="each would train alone"):
        check_world(Args, Launch(2, 0, False, False))
    with pytest.raises(ValueError, match="one process sees 4 GPUs"):
        check_world(SeveralGpus, Launch(1, 0, False, False))


# --------------------------------------------------------------------------------- real launchers
in_one_group = pytest.mark.xdist_group("launchers")


@pytest.mark.slow
@in_one_group
def test_the_script_finds_its_package_from_anywhere(tmp_path: Path) -> None:
    config = str(ROOT / "configs/quickstart.yaml")
    done = call(str(ROOT / SCRIPT), config, "--check", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@in_one_group
def test_a_killed_run_goes_on_to_the_identical_curve(
    tiny_llava_folder: Path, tmp_path: Path
) -> None:
    save = {"save_strategy": "steps", "save_steps": 5, "max_steps": 60}
    data = write_data(tmp_path / "data")
    whole, killed = (
        write_recipe(
            tmp_path / f"{name}.yaml",
            recipe_values(tiny_llava_folder, data, tmp_path / name, **save),
        )
        for name in ("whole", "killed")
    )
    options = ("lora.dropout=0.1", "data.workers=1", *PRUNED)
    assert call(SCRIPT, str(whole), *options).returncode == 0
    process = subprocess.Popen(
        [sys.executable, SCRIPT, str(killed), *options],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (tmp_path / "killed/checkpoint-10/recipe.yaml").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/checkpoint-60").exists()
    done = call(SCRIPT, str(killed), *options)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.slow
@in_one_group
def test_a_launcher_that_starts_one_process_instead_of_two_is_refused() -> None:
    accelerate = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    done = call(*accelerate, SCRIPT, "configs/quickstart.yaml")
    assert done.returncode != 0
    assert "error: accelerate was asked for several processes" in done.stderr
    assert "Traceback" not in done.stderr.split("error: accelerate was")[0]
