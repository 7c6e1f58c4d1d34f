"""docs/drop-in.md's Trainer program in two processes: one curve, the shares of both, one folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import set_seed

from itprune import load_pretrained
from tests.dropin.page import START, blocks, prepare, run
from tests.test_launch import environment

ROOT = Path(__file__).parents[2]
TRAINER = "transformers' Trainer"
NAMES = ("loss", "kept_stage1", "kept_stage2", "kept_average", "keep")
SEED = "from transformers import set_seed\n\nset_seed(42)\n"
OPTIONS = {
    '"outputs/trainer",': '"outputs/trainer", use_cpu=True,',
    'report_to="tensorboard"': 'report_to="none"',
}
TWO = {'"outputs/trainer",': '"outputs/two", use_cpu=True,', "batch_size=2": "batch_size=1"}


def two_processes(place: Path, replaced: dict[str, str]) -> list[dict[str, Any]]:
    """Runs the program in two processes and returns what it logged."""
    (code,) = blocks(TRAINER)
    for old, new in replaced.items():
        assert old in code, old
        code = code.replace(old, new)
    (place / "two.py").write_text(f"{SEED}\n{START}\n{code}")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", "2", "two.py"),
        ],
        cwd=place,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    state = json.loads((place / "outputs/two/checkpoint-4/trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


@pytest.mark.slow
def test_two_processes_are_one(
    tiny_llava_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = prepare(tmp_path, tiny_llava_folder)
    monkeypatch.chdir(place)
    set_seed(42)
    one = run(TRAINER, **OPTIONS)["trainer"].state.log_history[:-1]
    two = two_processes(place, OPTIONS | TWO)
    for name in NAMES:
        expected = [entry[name] for entry in one]
        assert [entry[name] for entry in two] == pytest.approx(expected, abs=1e-4), name
    record = load_pretrained("outputs/trainer").attached.calibration
    assert load_pretrained("outputs/two").attached.calibration == record
