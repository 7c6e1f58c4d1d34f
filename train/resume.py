"""Going on where a run stopped.

A run goes on by itself when its output folder holds a complete checkpoint of the same experiment,
the newest one; those above it that do not count are named. A folder that holds another experiment
is refused, so that nothing is mixed or overwritten by mistake.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from train.guards.complete import checkpoints, flaw
from train.recipe.config import RECIPE_NAME, Recipe

FREE = re.compile(
    r"trainer\.(logging_.*|save_.*|eval_.*|report_to|run_name|disable_tqdm|log_level.*|deepspeed"
    r"|max_steps|num_train_epochs|per_device_eval_batch_size|dataloader_.*|ddp_.*|use_cpu"
    r"|per_device_train_batch_size|gradient_accumulation_steps|output_dir|max_grad_norm)"
    r"|data\.(workers|val)"
)
"""Keys that may differ between a run and its continuation."""


def find_checkpoint(recipe: Recipe, resume: bool, speaks: bool = True) -> Path | None:
    """The checkpoint to go on from, or None for a new run.

    Args:
        recipe: the run that is starting.
        resume: whether there must be one.
        speaks: whether this process tells of checkpoints that do not count.

    Raises:
        ValueError: none where one is demanded, or one of another experiment.
    """
    checkpoint = latest_checkpoint(recipe.output, speaks)
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


def latest_checkpoint(output: Path, speaks: bool = True) -> Path | None:
    """The complete checkpoint with the highest step; what is wrong with those above it is told."""
    passed = []
    for folder in checkpoints(output):
        reason = flaw(folder)
        if reason is None:
            break
        passed.append(f"{folder} does not count: {reason}")
    else:
        folder = None
    if speaks:
        then = f"going on from {folder}" if folder is not None else "no checkpoint is left"
        for line in passed:
            print(f"{line}; {then}", file=sys.stderr)
    return folder


def agree(checkpoint: Path | None) -> None:
    """Makes sure that all processes go on from the same step.

    Raises:
        ValueError: they do not.
    """
    from accelerate.utils import gather_object

    found = gather_object([checkpoint.name if checkpoint is not None else "none"])
    if len(set(found)) > 1:
        raise ValueError(
            f"trainer.output_dir: the processes see different checkpoints ({', '.join(found)}); "
            "the folder must be one that all machines share"
        )


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
