"""Whole runs on streams and mixtures: a run that goes on has the curve of an unbroken one."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.train.helpers import losses, recipe_values, write_data, write_recipe
from train.launcher import Launch
from train.recipe.config import load_recipe
from train.run import run

ALONE = Launch(processes=1, rank=0, by_deepspeed=False, accelerate_deepspeed=False)
STEPS = 6


def shards(folder: Path, data: Path) -> Path:
    """The samples of a LLaVA file as three tar shards."""
    folder.mkdir()
    records = json.loads(data.read_text())
    for i in range(3):
        with tarfile.open(folder / f"s-{i}.tar", "w") as archive:
            for record in records[i::3]:
                files = {f"{record['id']}.json": json.dumps(record).encode()}
                if "image" in record:
                    files[Path(record["image"]).name] = (data.parent / record["image"]).read_bytes()
                for name, content in sorted(files.items()):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return folder


@pytest.fixture
def train(tiny_llava_folder: Path, tmp_path: Path) -> Any:
    """Runs a small recipe on 24 samples and 12 others; returns the output folder."""
    first = write_data(tmp_path / "a")
    second = write_data(tmp_path / "b", 12, seed=1)
    tars = shards(tmp_path / "tars", first)
    named = {"first": str(first), "second": str(second), "tars": str(tars)}

    def start(train: list[str], *overrides: str, name: str = "out") -> Path:
        values = recipe_values(tiny_llava_folder, first, tmp_path / name, max_steps=STEPS)
        values["data"]["train"] = [named[entry] for entry in train]
        values["trainer"] |= {"save_strategy": "steps", "save_steps": 2}
        recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", values), overrides)
        run(recipe, ALONE)
        return recipe.output

    return start


def interrupt(output: Path, at: int) -> Path:
    """The folder as it was when the run died behind its checkpoint at step `at`."""
    folder = output.with_name(f"{output.name}-dead")
    folder.mkdir()
    shutil.copytree(output / f"checkpoint-{at}", folder / f"checkpoint-{at}")
    return folder


STREAM = ("data.streaming=true", "data.shuffle_buffer=8")


@pytest.mark.parametrize(
    ("entries", "overrides"),
    [
        (
            ["first", "second"],
            ("data.weights=[1, 3]", "trainer.per_device_train_batch_size=12"),  # 3 steps an epoch
        ),
        (["tars"], (*STREAM, "prune.keep=0.4", "data.workers=2")),
        (["tars", "second"], (*STREAM, "data.weights=[2, 1]", "data.max_tokens_per_batch=150")),
    ],
    ids=["mixture", "tar shards, pruned", "streams mixed, by tokens"],
)
def test_a_run_goes_on_with_the_same_curve(
    train: Any, entries: list[str], overrides: tuple[str, ...]
) -> None:
    whole = train(entries, *overrides)
    curve = losses(whole)
    assert len(curve) == STEPS
    dead = interrupt(whole, 4)
    again = train(entries, *overrides, name=dead.name)
    assert losses(again) == curve
    assert not (again / "checkpoint-2").exists()


def test_a_stream_goes_on_with_as_many_workers_only(train: Any) -> None:
    output = train(["tars"], *STREAM, "trainer.max_steps=2")
    with pytest.raises(ValueError, match=r"read by 1 process.* with 1 reader"):
        train(["tars"], *STREAM, "data.workers=2")
    state = json.loads((output / "checkpoint-2/data_state.json").read_text())
    assert state["ranks"][0]["places"] == [[[0, 8, 8]]]


def test_tar_shards_without_streaming_are_told_what_to_do(train: Any) -> None:
    with pytest.raises(ValueError, match=r"set data\.streaming: true"):
        train(["tars"])
