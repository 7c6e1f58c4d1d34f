"""`--check`: what a recipe asks of this machine, tried without opening model or data."""

from __future__ import annotations

from typing import Any

from train.launcher import Launch, deepspeed_config
from train.recipe.arguments import training_arguments
from train.recipe.config import Recipe
from train.reports import check_reports

LAUNCHED = ("deepspeed", "fsdp", "fsdp_config")
"""Options that take effect under a launcher."""


def check_trainer(recipe: Recipe) -> Any:
    """The TrainingArguments of one process of the run.

    Raises:
        ValueError: transformers refuses a value, or a package is missing.
    """
    plain = {name: value for name, value in recipe.trainer.items() if name not in LAUNCHED}
    args = training_arguments(plain, recipe.data.workers, unused=recipe.trains_vision)
    check_reports(args.report_to)
    return args


def check(recipe: Recipe, launch: Launch) -> None:
    """Raises ValueError for what would stop the run before it loads anything."""
    deepspeed_config(recipe.trainer, launch)
    check_trainer(recipe)
