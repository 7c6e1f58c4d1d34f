"""Going on where a run stopped.

A checkpoint counts only when it is complete: the trainer writes its state last. A run goes on by
itself when its output folder holds a checkpoint of the same experiment; a folder that holds another
experiment is refused, so that nothing is mixed or overwritten by mistake.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from train.config import RECIPE_NAME, Recipe

FREE = re.compile(
    r"trainer\.(logging_.*|save_.*|eval_.*|report_to|run_name|disable_tqdm|log_level.*|deepspeed"
    r"|max_steps|num_train_epochs|per_device_eval_batch_size|dataloader_.*|ddp_.*|use_cpu"
    r"|per_device_train_batch_size|gradient_accumulation_steps|output_dir)"
    r"|data\.(workers|val)"
)
"""Keys that may differ between a run and its continuation."""


def find_checkpoint(recipe: Recipe, resume: bool) -> Path | None:
    """The checkpoint to go on from, or None for a new run.

    Args:
        recipe: the run that is starting.
        resume: whether there must be one.

    Raises:
        ValueError: none where one is demanded, or one of another experiment.
    """
    checkpoint = latest_checkpoint(recipe.output)
    if checkpoint is None and resume:
        raise ValueError(f"--resume: no complete checkpoint in {recipe.output}")
    folder = checkpoint or recipe.output
    if checkpoint is None and not _holds_model(folder):
        return None
    there = yaml.safe_load((folder / RECIPE_NAME).read_text(encoding="utf-8"))
    for key, old, new in differences(there, recipe.to_dict()):
        if not FREE.fullmatch(key):
            raise ValueError(
                f"{folder} is of another run: {key} was {old!r} and is {new!r}; choose another "
                "trainer.output_dir, or remove the folder"
            )
    return checkpoint


def latest_checkpoint(output: Path) -> Path | None:
    """The complete checkpoint with the highest step."""
    found = [p for p in output.glob("checkpoint-*") if p.name[11:].isdigit() and _complete(p)]
    return max(found, key=lambda path: int(path.name[11:]), default=None)


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, with both values."""
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


def _holds_model(folder: Path) -> bool:
    """Whether a finished run's weights would be overwritten."""
    return (folder / RECIPE_NAME).is_file() and any(folder.glob("*model*.safetensors"))


def _complete(folder: Path) -> bool:
    if not (folder / RECIPE_NAME).is_file():
        return False
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # the run ended while it was writing
    return True
