"""Runs shared by the tests of this folder: every launcher is started once, when it is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.matrix import jobs
from tests.distributed.starting import Done, Job, start
from tests.train.helpers import recipe_values, write_data, write_recipe

Runs = Callable[[str], dict[str, Done]]
SIDE = 2
"""Samples of a rank's batch."""

BYTES = tuple(
    Job(
        f"bytes-{name}-{keep}",
        (f"prune={{method: uniform, keep: {keep}}}", "trainer.max_steps=3", *overrides),
        count_bytes=True,
    )
    for name, overrides in (
        ("ddp", ()),
        ("fsdp2", ()),
        ("zero3", ("trainer.deepspeed=launch/deepspeed/zero3.json",)),
    )
    for keep in (1.0, 0.2)
)
TAUGHT = (
    "distill={every: 2, weight: 300}", "eval.keep=[0.25, 1.0]", "trainer.max_steps=4",
    "trainer.eval_strategy=steps", "trainer.eval_steps=2", "trainer.per_device_eval_batch_size=2",
)  # fmt: skip
DRAWN = {
    "plain": ("prune={method: itprune, keep: [0.25, 0.4, 1.0]}",),
    "parts": ("prune={method: quecc, keep: [0.25, 0.25, 1.0]}",),
}
"""Budgets drawn anew each step, 1.0 in the second, without and with trained parts."""


def drawn(launcher: str, method: str, *overrides: str) -> Job:
    side = 4 if launcher == "python" else SIDE
    size = f"trainer.per_device_train_batch_size={side}"
    return Job(f"drawn-{method}-{launcher}", (*DRAWN[method], *TAUGHT, size, *overrides))


MORE = {
    "python": [drawn("python", method) for method in DRAWN],
    "ddp 2": [drawn("ddp", "parts"), *(job for job in BYTES if "ddp" in job.name)],
    "fsdp2 2": [drawn("fsdp2", "parts"), *(job for job in BYTES if "fsdp2" in job.name)],
    "deepspeed 2": [
        drawn("zero3", "plain", "trainer.deepspeed=launch/deepspeed/zero3.json"),
        *(job for job in BYTES if "zero3" in job.name),
    ],
}


@pytest.fixture(scope="session")
def recipe(tiny_llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In every step one of two ranks has nothing but text, the other nothing but images."""
    folder = tmp_path_factory.mktemp("dist")
    data = write_data(folder / "data", text_every=2)
    rows = json.loads(data.read_text())
    kinds = [
        [row for row in rows if ("image" in row) is with_image] for with_image in (True, False)
    ]
    mixed = []
    for i in range(0, len(kinds[1]), SIDE):
        step = [kind[i : i + SIDE] for kind in kinds]
        mixed += [row for side in step[:: 1 if i % (2 * SIDE) else -1] for row in side]
    data.write_text(json.dumps(mixed))
    values = recipe_values(
        tiny_llava_folder,
        data,
        folder / "out",
        per_device_train_batch_size=SIDE,
        per_device_eval_batch_size=SIDE,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        ddp_timeout=40,
    )
    values["data"]["val"] = str(data)
    values["data"]["val"] = str(write_data(folder / "val", 7, seed=5))
    return write_recipe(folder / "recipe.yaml", values)


@pytest.fixture(scope="session")
def runs(
    recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Done]]:
    """Starts a launcher with all its jobs, once; returns what became of them by their names."""
    started: dict[str, dict[str, Done]] = {}

    def run(kind: str) -> dict[str, Done]:
        if kind not in started:
            folder = tmp_path_factory.mktemp("runs") / kind.replace(" ", "_")
            started[kind] = start(folder, kind, recipe, [*jobs(kind), *MORE.get(kind, [])])
        return started[kind]

    return run
