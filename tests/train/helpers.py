"""A small data set on disk and recipes for it, shared by the training tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from train.launcher import Launch
from train.recipe.config import load_recipe
from train.run import run

COLOURS = ("red", "green", "blue", "yellow")


def turn(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


def picture(colour: str, width: int, rng: random.Random) -> Image.Image:
    """A noisy colour: patches of one plain colour tie, and ties fall as rounding will have it."""
    noise = Image.frombytes("RGB", (width, 60), rng.randbytes(width * 60 * 3))
    return Image.blend(Image.new("RGB", noise.size, colour), noise, 0.5)


def write_data(folder: Path, count: int = 24, seed: int = 0, text_every: int = 5) -> Path:
    """LLaVA JSON with images, text-only rows, multi-turn rows and answers of uneven length."""
    rng = random.Random(seed)
    records = []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        colour = rng.choice(COLOURS)
        record: dict[str, Any] = {"id": str(i)}
        if i % text_every == text_every - 1:
            turns = [turn("human", "What is 1?"), turn("gpt", "1 is a number. " * (1 + i % 3))]
        else:
            picture(colour, 60 + i, rng).save(folder / f"images/{i}.png")
            record["image"] = f"images/{i}.png"
            turns = [turn("human", "<image>\nWhat colour?"), turn("gpt", f"It is {colour}.")]
        if i % 7 == 3:
            turns += [turn("human", "Are you sure?"), turn("gpt", "yes " * (1 + i % 4))]
        records.append({**record, "conversations": turns})
    path = folder / "train.json"
    path.write_text(json.dumps(records, indent=1))
    return path


def recipe_values(model: Path, data: Path, output: Path, **trainer: Any) -> dict[str, Any]:
    """A dense LoRA recipe of a few steps."""
    return {
        "model": {"path": str(model)},
        "data": {"train": str(data), "workers": 0},
        "lora": {"r": 4, "alpha": 8, "train_projector": True},
        "trainer": {
            "output_dir": str(output),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **trainer,
        },
    }


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def train_here(
    model: Path, data: Path, output: Path, *overrides: str, resume: bool = False
) -> Path:
    """Runs the small recipe with overrides in this process; returns its output folder."""
    values = recipe_values(model, data, output)
    recipe = load_recipe(write_recipe(output.with_suffix(".yaml"), values), overrides)
    run(recipe, Launch(1, 0, by_deepspeed=False, accelerate_deepspeed=False), resume)
    return output


def history(output: Path) -> list[dict[str, Any]]:
    """The logged steps of a finished run."""
    state = json.loads((output / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in history(output)]
