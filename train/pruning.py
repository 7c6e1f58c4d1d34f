"""Where training meets the library: attach, calibrate, and what a folder carries beside weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from itprune import Attached, PromptFormat, attach, calibrate
from itprune.attach import check_budgets
from itprune.checkpoint import PRUNER_FILE, PRUNER_WEIGHTS, PrunerRecord, save_pruner
from itprune.engine.request import PIXELS
from itprune.methods.dyvte import Dyvte
from itprune.writing import replace_text
from train.bad_samples import Bad
from train.data.collate import BAD, PLACES, Collator
from train.data.dataset import SampleDataset
from train.data.encode import Encoder
from train.model import PRUNER, base_of, widen_trained
from train.recipe.config import RECIPE_NAME, Recipe

CALIBRATION_SAMPLES = 256
CALIBRATION_BATCH = 4


def attach_pruner(
    model: nn.Module, recipe: Recipe, processor: Any, checkpoint: Path | None
) -> Any | None:
    """Attaches the pruner of the `prune` section; None for a dense run.

    The trained parts of a method start from the checkpoint, else from the base model's folder where
    that holds parts of the same method: a second stage of training goes on from the first.

    Args:
        model: after PEFT has wrapped it.
        recipe: the run.
        processor: tells the pruner the template's tokens.
        checkpoint: a run that goes on takes its calibration and its trained parts from here.

    Raises:
        ValueError: those parts are of another shape; a budget is out of the method's reach.
    """
    if recipe.prune is None:
        return None
    calibration = PrunerRecord.read(checkpoint).calibration if checkpoint is not None else None
    prompt = PromptFormat.from_processor(processor)
    attached = attach(model, recipe.prune, prompt=prompt, calibration=calibration)
    attached.packs_text = True  # a batch of text would be the dearest of a run otherwise
    check_evaluated(attached, recipe)
    if recipe.mode == "router" or PRUNER in recipe.model.freeze:
        attached.method.requires_grad_(False)
    for part in routed(attached.method):  # no language loss reaches a router
        part.routers.requires_grad_(recipe.mode == "router")
    trains = any(part.requires_grad for part in attached.method.parameters())
    if trains and 1.0 in recipe.prune.budgets and is_deepspeed_zero3_enabled():
        raise ValueError(
            "prune.keep: at 1.0 the method's trained parts do not run, and ZeRO-3 would move them "
            "by a gradient of an earlier step; use ZeRO-2 or FSDP2, or leave 1.0 out"
        )
    widen_trained(attached.method, recipe.model.dtype)  # before loading, which would round
    load_parts(attached.method, checkpoint or _parts_folder(recipe))
    return attached


def check_evaluated(attached: Attached, recipe: Recipe) -> None:
    """Refuses budgets of evaluations out of the method's reach, before there is one.

    Raises:
        ValueError: for the first that cannot be met.
    """
    keep = attached.keep
    try:
        check_budgets(attached.method, recipe.eval_keep)
    except ValueError as error:
        raise ValueError(f"eval.keep: {str(error).removeprefix('prune.keep: ')}") from None
    attached.set_keep(keep)


def load_parts(method: nn.Module, folder: Path | None) -> None:
    """Fills a method's trained parts from a folder; nothing happens where it holds none.

    Raises:
        ValueError: they do not fit.
    """
    path = folder / PRUNER_WEIGHTS if folder is not None else None
    if path is None or not path.is_file():
        return
    try:
        method.load_state_dict(load_file(path))
    except RuntimeError as error:
        reason = " ".join(str(error).split(":", 1)[-1].split())
        raise ValueError(f"{path}: does not fit the options in `prune` ({reason})") from None


def _parts_folder(recipe: Recipe) -> Path | None:
    """The base model's folder, if it was trained with the same method."""
    folder = Path(recipe.model.path)
    if recipe.prune is None or not (folder / PRUNER_FILE).is_file():
        return None
    same = PrunerRecord.read(folder).config.method == recipe.prune.method
    return folder if same else None


def entering_share(recipe: Recipe, attached: Any | None) -> float:
    """Share of the visual tokens that enters the LLM at the largest `keep` of the run; routers
    look at whole samples."""
    if attached is None or recipe.mode == "router":
        return 1.0
    now, budgets = attached.keep, attached.config.budgets
    attached.set_keep(None if None in budgets else max(budgets))
    share: float = attached.enters
    attached.set_keep(now)
    return share


def fit_encoder(encoder: Encoder, recipe: Recipe, model: nn.Module, attached: Any | None) -> None:
    """Tells the encoder how long a sample may be for this model with this pruner."""
    encoder.visual_share = entering_share(recipe, attached)
    encoder.positions = base_of(model).config.get_text_config().max_position_embeddings


def trained_method(attached: Any | None) -> nn.Module | None:
    """What is attached, if it has weights of its own."""
    if attached is None or next(attached.method.parameters(), None) is None:
        return None
    method: nn.Module = attached.method
    return method


def routed(method: nn.Module) -> list[Dyvte]:
    """The parts of a method that have routers: one at most, mode router has checked for one."""
    return [part for part in method.modules() if isinstance(part, Dyvte)]


def needs_calibration(attached: Any | None) -> bool:
    """Whether the rule's counts have yet to be fitted to the target."""
    if attached is None or attached.calibration is not None:
        return False
    return set(attached.config.budgets) != {1.0} and bool(attached.method.calibrates)


class CalibrateCallback(TrainerCallback):  # type: ignore[misc]
    """Calibrates once the model is on its device: before the first step, or after the last one.

    Every rank reads the same samples, so every rank comes to the same numbers.

    Args:
        attached: the pruner.
        batches: makes the samples' batches.
        late: after the last step, where what training makes is to be calibrated.
    """

    def __init__(
        self, attached: Any, batches: Callable[[], Iterable[Any]], late: bool = False
    ) -> None:
        self.attached = attached
        self.batches = batches
        self.late = late

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.late:
            self._calibrate(args, state)
            self.attached.set_step(0, state.max_steps, args.seed)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.late:
            self._calibrate(args, state)

    def _calibrate(self, args: Any, state: Any) -> None:
        self.attached.set_keep(self.attached.config.final_keep)
        kind = args.device.type
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=args.bf16):
            done = calibrate(self.attached, self.batches(), limit=CALIBRATION_SAMPLES)
        if state.is_world_process_zero:
            print(f"calibrated on {done.samples} samples for keep = {self.attached.keep}")


def save_beside(
    folder: Path,
    parts: Mapping[str, Tensor] | None,
    *,
    processor: Any,
    attached: Any | None,
    recipe: Recipe,
) -> None:
    """Writes pruner, processor and recipe beside the weights.

    Args:
        folder: where the weights are.
        parts: the method's gathered weights where it is sharded; None: it holds them itself.
        processor: saved with them.
        attached: the pruner, if there is one.
        recipe: the run.
    """
    processor.save_pretrained(folder)
    if attached is not None:
        save_pruner(folder, attached, recipe.to_dict(), parts)
    write_recipe(folder, recipe)


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Writes the resolved recipe into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / RECIPE_NAME, recipe.to_yaml())


def calibration_batches(
    data: SampleDataset, collator: Collator, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Up to 256 samples spread evenly over the training data, the same on every rank.

    Raises:
        ValueError: there is none with an image, and some cannot be used.
    """
    count = min(CALIBRATION_SAMPLES, len(data))
    chosen = Subset(data, [i * len(data) // count for i in range(count)])
    loader = DataLoader(
        chosen,
        batch_size=CALIBRATION_BATCH,
        collate_fn=collator,
        num_workers=workers,
        generator=torch.Generator(),  # leaves the run's own random numbers alone
    )
    bad: list[Bad] = []
    pictured = False
    for batch in loader:
        bad += batch.pop(BAD)
        batch.pop(PLACES)
        if "input_ids" in batch:
            pictured |= any(name in batch for name in PIXELS)
            yield batch
    if bad and not pictured:
        _, place, reason = bad[0]
        raise ValueError(
            f"data.train: calibration needs samples with images, but {len(bad)} of the {count} "
            f"looked at cannot be used; the first, {place}: {reason}"
        )
