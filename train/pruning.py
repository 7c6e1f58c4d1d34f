"""Where training meets the library: attach, calibrate, and what a folder carries beside weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import TrainerCallback

from itprune import PromptFormat, attach, calibrate
from itprune.checkpoint import PrunerRecord, save_pruner
from train.config import RECIPE_NAME, Recipe
from train.data.collate import BAD, Collator
from train.data.dataset import SampleDataset

CALIBRATION_SAMPLES = 256
CALIBRATION_BATCH = 4


def attach_pruner(
    model: nn.Module, recipe: Recipe, processor: Any, checkpoint: Path | None
) -> Any | None:
    """Attaches the pruner of the `prune` section; None for a dense run.

    Args:
        model: after PEFT has wrapped it.
        recipe: the run.
        processor: tells the pruner the template's tokens.
        checkpoint: a run that goes on takes its calibration from here.
    """
    if recipe.prune is None:
        return None
    calibration = PrunerRecord.read(checkpoint).calibration if checkpoint is not None else None
    prompt = PromptFormat.from_processor(processor)
    return attach(model, recipe.prune, prompt=prompt, calibration=calibration)


def needs_calibration(attached: Any | None) -> bool:
    """Whether the rule's counts have yet to be fitted to the target."""
    if attached is None or attached.calibration is not None:
        return False
    return attached.config.keep_at(1.0) != 1.0 and bool(attached.method.calibration_stages())


class CalibrateCallback(TrainerCallback):  # type: ignore[misc]
    """Calibrates once the model is on its device, before the first step.

    Every rank reads the same samples, so every rank comes to the same numbers.
    """

    def __init__(self, attached: Any, batches: Callable[[], Iterable[Any]]) -> None:
        self.attached = attached
        self.batches = batches

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.attached.set_progress(1.0)
        kind = args.device.type
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=args.bf16):
            done = calibrate(self.attached, self.batches(), limit=CALIBRATION_SAMPLES)
        if state.is_world_process_zero:
            print(f"calibrated on {done.samples} samples for keep = {self.attached.keep}")
        self.attached.set_progress(0.0)


def save_beside(folder: Path, processor: Any, attached: Any | None, recipe: Recipe) -> None:
    """Writes pruner, processor and recipe beside the weights."""
    processor.save_pretrained(folder)
    if attached is not None:
        save_pruner(folder, attached, recipe.to_dict())
    write_recipe(folder, recipe)


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Writes the resolved recipe into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{RECIPE_NAME}"
    partial.write_text(recipe.to_yaml(), encoding="utf-8")
    partial.replace(folder / RECIPE_NAME)


def calibration_batches(
    data: SampleDataset, collator: Collator, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Up to 256 samples spread evenly over the training data, the same on every rank."""
    count = min(CALIBRATION_SAMPLES, len(data))
    chosen = Subset(data, [i * len(data) // count for i in range(count)])
    loader = DataLoader(
        chosen,
        batch_size=CALIBRATION_BATCH,
        collate_fn=collator,
        num_workers=workers,
        generator=torch.Generator(),  # leaves the run's own random numbers alone
    )
    for batch in loader:
        batch.pop(BAD)
        if "input_ids" in batch:
            yield batch
