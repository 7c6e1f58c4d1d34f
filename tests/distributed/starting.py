"""Starts a launcher once for many jobs (tests/distributed/several.py) and tells what came of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 900
"""Seconds of a whole start; every job has its own, shorter limit."""


@dataclass(frozen=True)
class Job:
    """One run of launch/train.py."""

    name: str
    overrides: tuple[str, ...] = ()
    kill_at: str | None = None
    """A file of the output folder whose appearance kills all processes at once."""
    goes_on: str | None = None
    """The job into whose output folder this one goes on."""
    count_bytes: bool = False
    """Whether to count what its processes send."""


@dataclass(frozen=True)
class Done:
    """What became of a job."""

    output: Path
    status: tuple[str, ...]
    """Of each process: an exit status, `killed`, or `hangs`."""
    said: tuple[str, ...]
    """What each process printed."""
    sent: tuple[dict[str, int], ...] = ()
    """Bytes of each process by collective, where they were counted."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def command(kind: str) -> tuple[list[str], int]:
    """The command of a launcher without its script, and how many processes it starts."""
    binaries = Path(sys.executable).parent
    deepspeed = [sys.executable, str(binaries / "deepspeed"), "--master_port", str(free_port())]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    files = {"ddp": "cpu2", "fsdp2": "fsdp2_cpu2", "zero3": "zero3"}
    if kind == "python":
        return [sys.executable], 1
    name, _, count = kind.partition(" ")
    if name == "deepspeed":
        return [*deepspeed, "--num_gpus", count], int(count)
    config = ["--config_file", f"launch/accelerate/{files[name]}.yaml"]
    return [*accelerate, *config, "--num_processes", count], int(count)


def environment() -> dict[str, str]:
    """Quiet, offline, one thread, no GPU."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **quiet, "PATH": path, "CUDA_VISIBLE_DEVICES": ""}


def start(folder: Path, kind: str, recipe: Path, jobs: Sequence[Job]) -> dict[str, Done]:
    """Runs jobs one after the other under one launcher.

    Args:
        folder: new; gets the jobs' outputs.
        kind: `python`, or `deepspeed`, `ddp`, `fsdp2`, `zero3` and the number of processes.
        recipe: of all jobs; each has its overrides.
        jobs: what to run.
    """
    folder.mkdir()
    words, processes = command(kind)
    outputs = {job.name: folder / (job.goes_on or job.name) for job in jobs}
    listed = [
        {
            "name": job.name,
            "port": free_port(),
            "count_bytes": job.count_bytes,
            "kill_at": None if job.kill_at is None else str(outputs[job.name] / job.kill_at),
            "argv": [str(recipe), f"trainer.output_dir={outputs[job.name]}", *job.overrides],
        }
        for job in jobs
    ]
    (folder / "jobs.json").write_text(json.dumps(listed, indent=1))
    with (folder / "launcher.log").open("w") as log:
        process = subprocess.Popen(
            [*words, "tests/distributed/several.py", str(folder / "jobs.json")],
            cwd=ROOT,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    assert status == 0, (folder / "launcher.log").read_text()[-3000:]
    return {job.name: _done(folder, job.name, outputs[job.name], processes) for job in jobs}


def _done(folder: Path, name: str, output: Path, processes: int) -> Done:
    def each(ending: str) -> list[str]:
        paths = [folder / f"{name}.{rank}.{ending}" for rank in range(processes)]
        return [path.read_text() for path in paths if path.exists()]

    sent = tuple(json.loads(text) for text in each("bytes"))
    return Done(output, tuple(each("status")), tuple(each("log")), sent)
