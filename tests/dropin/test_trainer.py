"""docs/drop-in.md with transformers' Trainer, a plain loop and accelerate: the page's own programs,
and what they leave behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import set_seed

from itprune import Calibration, PrunerCallback, attach, load_pretrained
from itprune.checkpoint import PrunerRecord
from itprune.cli import main
from tests.dropin.page import TWO, blocks, prepare, run
from tests.train.helpers import losses, write_recipe
from train.config import load_recipe
from train.launcher import Launch
from train.run import run as run_recipe

TRAINER = "transformers' Trainer"
SHARES = {"keep", "kept_stage1", "kept_stage2", "kept_average"}
ALONE = Launch(processes=1, rank=0, by_deepspeed=False, accelerate_deepspeed=False)


@pytest.fixture(scope="module")
def place(tiny_llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which the page's programs run."""
    folder = prepare(tmp_path_factory.mktemp("drop_in"), tiny_llava_folder)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def trained(place: Path) -> dict[str, Any]:
    """The Trainer's program, run."""
    set_seed(42)
    return run(TRAINER)


def test_the_two_statements_are_in_the_programs() -> None:
    for heading in (TRAINER, "TRL's SFTTrainer"):
        assert TWO in blocks(heading)[0]


def test_the_curve_is_that_of_our_own_training(trained: dict[str, Any], place: Path) -> None:
    """Another collator, another data format and another trainer, but the same batches."""
    values = {
        "model": {"path": str(place / "llava-1.5-7b-hf")},
        "data": {"train": str(place / "train.json"), "workers": 0},
        "lora": {"r": 8, "alpha": 16, "target": ["q_proj", "v_proj"]},
        "prune": {"keep": 0.22},
        "trainer": {
            "output_dir": str(place / "recipe"),
            "num_train_epochs": 1,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-4,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
        },
    }
    recipe = load_recipe(write_recipe(place / "recipe.yaml", values), [])
    run_recipe(recipe, ALONE)
    assert losses(place / "outputs/trainer/checkpoint-4") == pytest.approx(
        losses(place / "recipe"), abs=1e-5
    )
