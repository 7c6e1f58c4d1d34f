"""launch/train.py under the real launchers: one loss curve, whoever starts it."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.train.helpers import history, losses, recipe_values, write_data, write_recipe
from train.launcher import Launch, check_world, deepspeed_config, read_launch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "launch/train.py"
TOLERANCE = 1e-4
PRUNED = ("prune.keep=0.4",)
Start = Callable[..., Path]


def launcher(kind: str) -> list[str]:
    """The command of a launcher, without its script; processes follow the name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    binaries = Path(sys.executable).parent
    deepspeed = [sys.executable, str(binaries / "deepspeed"), "--master_port", port]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    return {
        "python": [sys.executable],
        "deepspeed": deepspeed,
        "deepspeed 2": [*deepspeed, "--num_gpus", "2"],
        "accelerate 2": [*accelerate, "--config_file", "launch/accelerate/cpu2.yaml"],
        "accelerate --cpu": [*accelerate, "--cpu", "--num_processes", "2"],
    }[kind]


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **quiet, "PATH": path, "CUDA_VISIBLE_DEVICES": ""}


def call(kind: str, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher(kind), *words],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def start(tiny_llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Runs the small recipe under a launcher and returns its output folder."""
    folder = tmp_path_factory.mktemp("launch")
    data = write_data(folder / "data", text_every=2)  # often one rank has no image at all

    def run(kind: str, name: str, *overrides: str) -> Path:
        values = recipe_values(tiny_llava_folder, data, folder / name, max_steps=6)
        recipe = write_recipe(folder / f"{name}.yaml", values)
        batch = 2 if kind.endswith("2") else 4
        size = f"trainer.per_device_train_batch_size={batch}"
        done = call(kind, SCRIPT, str(recipe), size, *overrides)
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / name / "stdout.txt").write_text(done.stdout)
        return folder / name

    return run


@pytest.fixture(scope="module")
def reference(start: Start) -> list[float]:
    """The pruned curve of one plain process."""
    return losses(start("python", "reference", *PRUNED))


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


def test_processes_that_do_not_know_of_each_other_are_refused() -> None:
    class Args:
        world_size = 1

    check_world(Args, Launch(1, 0, False, False))
    with pytest.raises(ValueError, match="each would train alone"):
        check_world(Args, Launch(2, 0, False, False))


# --------------------------------------------------------------------------------- real launchers
in_one_group = pytest.mark.xdist_group("launchers")


@pytest.mark.slow
@in_one_group
def test_the_script_finds_its_package_from_anywhere(tmp_path: Path) -> None:
    config = str(ROOT / "configs/quickstart.yaml")
    done = call("python", str(ROOT / SCRIPT), config, "--check", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@in_one_group
@pytest.mark.parametrize("kind", ["deepspeed", "accelerate 2"])
def test_every_launcher_gives_the_same_curve(
    start: Start, reference: list[float], kind: str
) -> None:
    output = start(kind, kind.replace(" ", "_"), *PRUNED)
    assert losses(output) == pytest.approx(reference, abs=TOLERANCE)
    said = (output / "stdout.txt").read_text()
    assert f"{2 if kind.endswith('2') else 1} process(es)" in said
    assert ("DeepSpeed ZeRO-2" in said) == (kind == "deepspeed")
    assert history(output)[0]["tokens_in"] == history(output.with_name("reference"))[0]["tokens_in"]


@pytest.mark.slow
@in_one_group
def test_zero2_on_two_processes_and_resumed(start: Start, reference: list[float]) -> None:
    options = (*PRUNED, "trainer.save_strategy=steps", "trainer.save_steps=3")
    output = start("deepspeed 2", "zero2", *options)
    assert losses(output) == pytest.approx(reference, abs=TOLERANCE)
    assert "2 process(es) on cpu, DeepSpeed ZeRO-2" in (output / "stdout.txt").read_text()
    (output / "checkpoint-6").rename(output / "gone")
    output = start("deepspeed 2", "zero2", *options, "--resume")
    assert "going on from" in (output / "stdout.txt").read_text()
    assert losses(output) == pytest.approx(reference, abs=TOLERANCE)


@pytest.mark.slow
@in_one_group
def test_zero3_trains_everything_to_the_same_curve(start: Start) -> None:
    full = ("model.mode=full", "lora=null", *PRUNED)
    alone = start("python", "full", *full)
    zero3 = "trainer.deepspeed=launch/deepspeed/zero3.json"
    output = start("deepspeed 2", "full_zero3", *full, zero3)
    assert losses(output) == pytest.approx(losses(alone), abs=TOLERANCE)
    assert "DeepSpeed ZeRO-3" in (output / "stdout.txt").read_text()
    assert (output / "model.safetensors").stat().st_size > 500_000


@pytest.mark.slow
@in_one_group
def test_a_killed_run_goes_on_to_the_identical_curve(
    start: Start, tiny_llava_folder: Path, tmp_path: Path
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
    assert call("python", SCRIPT, str(whole), *options).returncode == 0
    process = subprocess.Popen(
        [*launcher("python"), SCRIPT, str(killed), *options],
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
    done = call("python", SCRIPT, str(killed), *options)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.slow
@in_one_group
def test_a_launcher_that_starts_one_process_instead_of_two_is_refused() -> None:
    done = call("accelerate --cpu", SCRIPT, "configs/quickstart.yaml")
    assert done.returncode != 0
    assert "error: accelerate was asked for several processes" in done.stderr
    assert "Traceback" not in done.stderr.split("error: accelerate was")[0]
