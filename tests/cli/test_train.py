"""`itprune train`: the launcher that fits; real ones, around a stand-in for training."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from itprune.cli import main
from itprune.cli.train import Start, choose
from itprune.project import find_project
from tests.test_launch import environment

ROOT = Path(__file__).resolve().parent.parent.parent
FSDP2_CPU2, ZERO3 = "launch/accelerate/fsdp2_cpu2.yaml", "launch/accelerate/zero3.yaml"
QUICKSTART = str(ROOT / "configs/quickstart.yaml")
STAND_IN = '''
"""Stands for launch/train.py: tells that it runs, and how it ended."""
import os, signal, sys
from pathlib import Path

if "--check" in sys.argv:
    print("trainer: {use_cpu: true}")
    sys.exit()
rank = os.environ.get("RANK", "0")
note = Path(__file__).parent / f"{os.environ.get('WORLD_SIZE', '1')}.{rank}"

def stop(number, frame):
    note.with_name(note.name + ".stopped").touch()
    sys.exit(3)

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
note.write_text(f"{os.getpid()} {' '.join(sys.argv[1:])}")
if "fail=1" in sys.argv:
    sys.exit(7)
while "wait=1" in sys.argv:
    signal.pause()
'''


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A clone with the stand-in and the real launch files, and a recipe in a folder inside."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/train.py").write_text(STAND_IN)
    (tmp_path / "launch/accelerate").symlink_to(ROOT / "launch/accelerate")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "itprune"\n')
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside/recipe.yaml").write_text("{}\n")
    return tmp_path


def options(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{"nproc": None, "launcher": None, "config_file": None, **changes})


# -------------------------------------------------------------------------------- the choice
@pytest.mark.parametrize(
    ("given", "trainer", "gpus", "expected"),
    [
        ({}, {}, 0, ("none", 1)),
        ({}, {}, 1, ("none", 1)),
        ({}, {}, 8, ("accelerate", 8)),
        ({}, {"deepspeed": "x.json"}, 8, ("deepspeed", 8)),
        ({}, {"deepspeed": "x.json"}, 1, ("none", 1)),
        ({"nproc": 1}, {}, 8, ("accelerate", 1)),
        ({"nproc": 2}, {}, 0, ("accelerate", 2)),
        ({"nproc": 2}, {"deepspeed": "x.json"}, 0, ("deepspeed", 2)),
        ({"launcher": "deepspeed"}, {}, 0, ("deepspeed", 1)),
        ({"config_file": ZERO3}, {"deepspeed": "x.json"}, 4, ("accelerate", 4)),
        ({"config_file": FSDP2_CPU2}, {}, 0, ("accelerate", 2)),
        ({"config_file": FSDP2_CPU2, "nproc": 3}, {}, 0, ("accelerate", 3)),
    ],
)
def test_the_launcher_that_fits(
    given: dict[str, object], trainer: dict[str, str], gpus: int, expected: tuple[str, int]
) -> None:
    start = choose(options(**given), trainer, gpus, find_project(ROOT))
    assert (start.launcher, start.processes) == expected


def test_deepspeed_and_accelerate_are_told_the_number() -> None:
    project = find_project(ROOT)
    script = ["train.py", "a.yaml"]
    some = Start("deepspeed", 2, 8).command(project, script)
    assert some[some.index("--num_gpus") + 1] == "2"
    assert "--num_gpus" not in Start("deepspeed", 8, 8).command(project, script)
    words = Start("accelerate", 4, 8).command(project, script)
    assert words[words.index("--num_processes") + 1] == "4"
    assert words[words.index("--config_file") + 1].endswith("multi_gpu.yaml")
    assert Start("none", 1, 1).command(project, script) == [sys.executable, *script]


@pytest.mark.parametrize(
    ("given", "gpus", "reason"),
    [
        ({"nproc": 9}, 8, "this machine shows 8"),
        ({"nproc": 2, "launcher": "none"}, 0, "runs without a launcher"),
        ({"launcher": "none", "nproc": 1}, 8, "spread each batch"),
        ({"launcher": "deepspeed", "config_file": "a.yaml"}, 0, "belongs to accelerate"),
        ({"config_file": "a.yaml"}, 0, "no such file: a.yaml"),
    ],
)
def test_what_cannot_start(given: dict[str, object], gpus: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        choose(options(**given), {}, gpus, find_project(ROOT))


@pytest.mark.parametrize("text", ["num_processes: many", "[", "- 2", "num_processes: 0"])
def test_a_bad_file_of_accelerate_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"--config-file: .*a\.yaml") as caught:
        choose(options(config_file=str(tmp_path / "a.yaml")), {}, 0, find_project(ROOT))
    assert "\n" not in str(caught.value)


def test_refusals_are_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(*words: str) -> str:
        assert main(["train", *words]) == 1
        out, err = capsys.readouterr()
        assert not out
        assert err.count("\n") == 1
        return err

    assert "no such recipe" in refusal(str(tmp_path / "none.yaml"))
    assert "at least 1" in refusal(QUICKSTART, "--nproc", "0")
    monkeypatch.setattr("itprune.cli.train.find_spec", lambda name: None)
    assert "pip install" in refusal(QUICKSTART)
    with pytest.raises(SystemExit) as stop:
        main(["train", QUICKSTART, "--launcher", "mpi"])
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["train", QUICKSTART, "--nproc", "1", "nonsense"])
    assert stop.value.code == 2


def test_without_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/train.py").touch()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\n')
    assert find_project(tmp_path).root == ROOT  # an editable install
    monkeypatch.setattr("itprune.project.__file__", str(tmp_path / "site/itprune/project.py"))
    with pytest.raises(ValueError, match="runs from a clone"):
        find_project(tmp_path)
    assert find_project(ROOT / "tests").root == ROOT


def test_a_dry_run_prints_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", QUICKSTART, "--dry-run", "prune.keep=0.5", "--resume"]) == 0
    words = shlex.split(capfd.readouterr().out)
    script = str(ROOT / "launch/train.py")
    assert words == [sys.executable, script, QUICKSTART, "prune.keep=0.5", "--resume"]


# ---------------------------------------------------------------- real launchers, training stood in
def start(project: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "itprune.cli", "train", "recipe.yaml", *words],
        cwd=project / "inside",
        env=environment() | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=120)[0]
    finally:
        process.kill()


def test_the_exit_status_is_that_of_training(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project / "inside")
    assert main(["train", "recipe.yaml", "fail=1"]) == 7
    _, *words = (project / "launch/1.0").read_text().split()
    assert words == ["recipe.yaml", "fail=1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes", "number"),
    [
        ("none", 1, signal.SIGINT),
        ("deepspeed", 2, signal.SIGTERM),
        ("accelerate", 2, signal.SIGINT),
    ],
)
def test_a_signal_reaches_every_process(
    project: Path, launcher: str, processes: int, number: int
) -> None:
    process = start(project, "wait=1", "--launcher", launcher, "--nproc", str(processes))
    notes = [project / f"launch/{processes}.{rank}" for rank in range(processes)]
    while not all(note.exists() and note.read_text() for note in notes):
        assert process.poll() is None, end(process)
        time.sleep(0.02)
    process.send_signal(number)
    said = end(process)
    assert process.returncode != 0
    assert "passed on" in said
    for note in notes:
        assert note.with_name(f"{note.name}.stopped").exists(), said
        with pytest.raises(ProcessLookupError):
            os.kill(int(note.read_text().split()[0]), 0)
