"""launch/vllm: the scripts up to both servers, on stand-ins for SLURM, vLLM and our own command."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.vllm.documented import documented

ROOT = Path(__file__).resolve().parent.parent
SCONTROL = """[[ "$*" == "show hostnames cluster[1-2]" ]] || exit 1
printf '%s\\n' alpha beta"""
SRUN = """shift  # --kill-on-bad-exit=0
"$@" """
VLLM = 'echo "vllm $*" | tee "$([[ -p pipe ]] && echo pipe || echo /dev/null)"'
FRONT = 'cat pipe > first; echo "itprune $*"'
"""Reads what a node says before it says something itself."""
OPTIONS = "--enable-prompt-embeds --enable-mm-embeds"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with launch/ and a model, and the stand-ins in bin/."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "deployed").mkdir()
    (tmp_path / "deployed" / "config.json").write_text("{}")
    (tmp_path / "bin").mkdir()
    for name, text in {"scontrol": SCONTROL, "srun": SRUN, "vllm": VLLM, "itprune": FRONT}.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run(project: Path, script: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}"
    slurm = {"SLURM_SUBMIT_DIR": str(project), "SLURM_JOB_NODELIST": "cluster[1-2]"}
    return subprocess.run(
        ["bash", str(ROOT / "launch/vllm" / script), *words], cwd=project, capture_output=True,
        env={**os.environ, **slurm, "SLURM_JOB_ID": "7", "PATH": path, **env}, text=True,
        timeout=60, check=False,
    )  # fmt: skip


def test_a_node(project: Path) -> None:
    done = run(project, "node.sh", "deployed", "--dtype", "bfloat16", HOST="10.0.0.5", PORT="8001")
    assert done.returncode == 0, done.stderr
    named = "serve deployed --served-model-name deployed"
    assert done.stdout == f"vllm {named} --host 10.0.0.5 --port 8001 {OPTIONS} --dtype bfloat16\n"

    (project / "outputs").mkdir()
    (project / "deployed").rename(project / "outputs" / "deployed")
    for command in documented("launch/vllm/node.sh"):
        done = run(project, Path(command[0]).name, *command[1:])
        assert done.stdout.split() == documented("vllm", "serve")[0], done.stderr


def test_every_node_of_a_job_and_one_address_before_them(project: Path) -> None:
    os.mkfifo(project / "pipe")
    ((_, _, _, option, value),) = documented("sbatch", "launch/vllm/slurm.sh")
    done = run(project, "slurm.sh", "deployed", option, value)
    assert done.returncode == 0, done.stderr
    node = (project / "first").read_text()
    assert f"--host 0.0.0.0 --port 20007 {OPTIONS} {option} {value}" in node
    addresses = "http://alpha:20007,http://beta:20007"
    front = f"itprune serve deployed --engine vllm --upstream {addresses} --port 8080"
    assert done.stdout.splitlines()[-1] == front


@pytest.mark.parametrize("script", ["node.sh", "slurm.sh"])
def test_what_they_refuse(project: Path, script: str) -> None:
    done = run(project, script)
    assert (done.returncode, done.stderr.split(":")[0]) == (2, "usage")
    done = run(project, "node.sh", "nothing")
    assert done.returncode == 2
    assert "itprune export CHECKPOINT --to vllm" in done.stderr
    done = run(project, "slurm.sh", "deployed", SLURM_SUBMIT_DIR=str(project / "bin"))
    assert "holds no launch/vllm/node.sh" in done.stderr
