"""Faults of real processes: signals, dead data workers, ranks that are killed or stuck."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed.starting import ROOT, command, environment
from tests.train.helpers import losses, recipe_values, write_data, write_recipe
from train.guards.complete import flaw
from train.launcher import Launch
from train.recipe.config import load_recipe
from train.resume import latest_checkpoint
from train.run import run

ALONE = Launch(processes=1, rank=0, by_deepspeed=False, accelerate_deepspeed=False)
STEPS = 30
LIMIT = 150
"""Seconds after which a run that should have ended is ended."""
TOLERANCE = 1e-4

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("faults")]


class Running:
    """A run under a launcher, in a process group of its own.

    Attributes:
        said: the lines read so far, of stdout and stderr.
    """

    def __init__(self, kind: str, *words: str) -> None:
        self.said: list[str] = []
        # Started in the background, this process may ignore Ctrl-C, and children inherit that.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(
            [*command(kind)[0], "launch/train.py", *words],
            cwd=ROOT,
            env={**environment(), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        signal.signal(signal.SIGINT, before)
        self._timer = threading.Timer(LIMIT, self.signal, [signal.SIGKILL])
        self._timer.start()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()
        self.signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def signal(self, number: int) -> None:
        """To all processes, as a scheduler sends it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def until(self, pattern: str, times: int = 1) -> str:
        """The line that matches for the so-manieth time."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.rstrip())
            times -= re.search(pattern, line) is not None
            if not times:
                return self.said[-1]
        raise AssertionError("\n".join(self.said))

    def end(self, *statuses: int) -> None:
        """Reads what is left and waits; the exit status must be one of these, none: a failure."""
        assert self.process.stdout is not None
        self.said += [line.rstrip() for line in self.process.stdout]
        status = self.process.wait()
        told = [line for line in self.said if "'loss'" not in line]
        assert status in statuses if statuses else status, "\n".join([*told, str(status)])

    def error(self) -> str:
        """The one line that tells what went wrong, and no stack trace."""
        found = [line for line in self.said if line.startswith("error")]
        assert len(found) == 1, "\n".join(self.said)
        assert not any("Traceback" in line for line in self.said), "\n".join(self.said)
        return found[0]

    def processes(self, rank: int) -> list[psutil.Process]:
        """The training process of a rank, then its data workers."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in children if p.environ().get("RANK") == str(rank)]


@pytest.fixture(scope="module")
def model(tiny_llava_folder: Path) -> Path:
    return tiny_llava_folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("faults") / "data")


def recipe(model: Path, data: Path, output: Path, **trainer: Any) -> Path:
    """Checkpoints of every fifth of 30 steps; 4 samples a step."""
    saves = {"save_strategy": "steps", "save_steps": 5, "max_steps": STEPS, **trainer}
    return write_recipe(output.with_suffix(".yaml"), recipe_values(model, data, output, **saves))


def finish(config: Path, *overrides: str) -> list[float]:
    """Runs to the end in this process; the losses of all steps."""
    loaded = load_recipe(config, overrides)
    run(loaded, ALONE)
    return losses(loaded.output)


@pytest.fixture(scope="module")
def unbroken(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The curve of one process that nothing happens to."""
    return finish(recipe(model, data, tmp_path_factory.mktemp("unbroken") / "out"))


def saved(output: Path) -> int:
    """The step of the last complete checkpoint."""
    found = latest_checkpoint(output, speaks=False)
    assert found is not None
    return int(found.name.rpartition("-")[2])


def test_signals_and_dead_workers_leave_a_checkpoint_to_go_on_from(
    model: Path, data: Path, tmp_path: Path, unbroken: list[float]
) -> None:
    output = tmp_path / "out"
    config = recipe(model, data, output, save_steps=100, dataloader_persistent_workers=True)
    words = (str(config), "data.workers=2")
    with Running("python", *words) as running:
        running.until("'loss'", times=4)
        running.signal(signal.SIGTERM)  # the data workers hear it, too, and must not leave
        running.end(128 + signal.SIGTERM)
        step = saved(output)
        assert 4 <= step < STEPS
        assert running.error() == (
            f"error: stopped by SIGTERM after step {step}; the last complete checkpoint is "
            f"{output}/checkpoint-{step}, from which the same command goes on"
        )
        assert not (output / "adapter_model.safetensors").exists()  # not taken for trained

    with Running("python", *words) as running:
        running.until("'loss'", times=2)
        worker = psutil.Process(running.process.pid).children()[0]
        worker.kill()
        running.end(1)
        error = running.error()
        assert re.match(r"error: a data worker died in step \d+, .*train.json, rec", error)
        assert f"the last complete checkpoint is {output}/checkpoint-{step}, from" in error

    with Running("python", *words) as running:
        running.until("'loss'", times=3)
        running.process.send_signal(signal.SIGINT)
        running.end(130)
        error = running.error()
        assert re.match(rf"error: interrupted in step \d+, .*{output}/checkpoint-{step}", error)

    alone = ("data.workers=0", "trainer.dataloader_persistent_workers=false")
    assert finish(config, *alone) == unbroken


def test_a_stuck_rank_is_named_by_the_others(model: Path, data: Path, tmp_path: Path) -> None:
    config = recipe(model, data, tmp_path / "out", ddp_timeout=8, per_device_train_batch_size=2)
    with Running("ddp 2", str(config), "prune.keep=1.0") as running:
        running.until("'loss'", times=12)
        (stuck,) = running.processes(rank=1)
        stuck.send_signal(signal.SIGSTOP)
        error = running.until("^error")
        stuck.kill()  # the launcher would wait half a minute for it
        running.end()
    where = r"step \d+, [\w' -]+"
    assert re.match(
        rf"error: (nothing moved for \d+ s|lost another process).*: rank 0 in {where} "
        rf"\(samples: .*train.json, record \d+.*\); rank 1 does not answer, last heard of in "
        rf"{where}; the last complete checkpoint is {tmp_path}/out/checkpoint-10, from which",
        error,
    ), error
    assert saved(tmp_path / "out") == 10


def test_a_killed_rank_under_zero2_and_a_shard_cut_short(
    model: Path, data: Path, tmp_path: Path, unbroken: list[float]
) -> None:
    output = tmp_path / "out"
    config = recipe(model, data, output, per_device_train_batch_size=2, ddp_timeout=60)
    with Running("deepspeed 2", str(config)) as running:
        running.until("'loss'", times=12)
        (killed,) = running.processes(rank=1)
        killed.kill()
        error = running.until("^error")
        running.end()
    assert re.match(
        r"error: lost another process \(.*\): rank 0 in step \d+, .* \(samples: .*\); rank 1 does "
        r"not answer, last heard of in step \d+, .*; the last complete checkpoint is "
        rf"{output}/checkpoint-10, from which",
        error,
    ), error
    (shard,) = (output / "checkpoint-10").glob("global_step*/*rank_1_*optim_states.pt")
    os.truncate(shard, shard.stat().st_size // 2)
    assert "optim_states.pt has" in (flaw(output / "checkpoint-10") or "")
    with Running("deepspeed 2", str(config)) as running:
        running.end(0)
        (said,) = [line for line in running.said if "does not count" in line]
        assert said.endswith(f"going on from {output}/checkpoint-5")
    assert losses(output) == pytest.approx(unbroken, abs=TOLERANCE)
