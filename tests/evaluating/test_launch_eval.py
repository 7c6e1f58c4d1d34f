"""launch/eval.py: processes that share an evaluation, started by accelerate and killed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.evaluating.conftest import SMALL, case_file, read

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "eval.py"
CASES = ("dense", "random-0.25-seed0", "downsample-0.25", "topk_cls-0.25")


@pytest.fixture(scope="module")
def launcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch_eval", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(checkpoint: Path, data: Path, out: Path) -> list[str]:
    fixed = ["--model", str(checkpoint), "--task", "records", "--data", str(data)]
    return [*fixed, "--output", str(out / "out"), "--keep", "0.25", *SMALL]


def test_errors_are_one_sentence(
    launcher: ModuleType, checkpoint: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    assert launcher.main([*options(checkpoint, data, tmp_path), "--batch-size", "0"]) == 1
    assert capsys.readouterr().err == "error: --batch-size: must be at least 1, got 0\n"


@pytest.mark.slow
def test_two_processes_after_a_kill_give_what_one_gives(
    launcher: ModuleType, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    assert launcher.main(options(checkpoint, data, tmp_path / "one")) == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    alone = [sys.executable, str(SCRIPT), *options(checkpoint, data, tmp_path / "two")]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    killed = subprocess.Popen(alone, env=environment, **quiet)  # type: ignore[call-overload]
    answers = tmp_path / "two" / "out" / "answers"
    while not list(answers.glob("*/dense.jsonl.rank0")):
        with pytest.raises(subprocess.TimeoutExpired):  # it must not end before
            killed.wait(0.05)
    killed.kill()  # SIGKILL, after its first batch
    killed.wait()
    assert not (tmp_path / "two" / "out" / "eval.json").exists()

    config = ROOT / "launch" / "accelerate" / "cpu2.yaml"
    several = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    done = subprocess.run(
        [*several, str(SCRIPT), *options(checkpoint, data, tmp_path / "two")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "topk_cls" in done.stdout
    for name in CASES:
        assert read(case_file(tmp_path / "two", name)) == read(case_file(tmp_path / "one", name))
    assert not list(answers.glob("*/*.rank*"))
