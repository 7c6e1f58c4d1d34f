"""PrunerCallback: everything a pruned training needs from transformers' Trainer, or from TRL's.

    attached = attach(trainer.model, PruneConfig(keep=0.22), prompt=…)
    PrunerCallback(attached, processor).add_to(trainer)

It moves a `keep` that changes in training, logs what was kept beside the loss, and puts the pruner
into every checkpoint, so that `itprune.load_pretrained` loads any of them.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed import all_reduce, get_rank, is_initialized
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainerCallback

from itprune.attach import Attached, base_model
from itprune.calibrating import calibrate
from itprune.calibration import Calibration
from itprune.card import TAG, TRAINER_STATE, KeptShares, history_of, is_ours, write_card
from itprune.checkpoint import save_pruner
from itprune.engine.request import IGNORE
from itprune.families import find_family
from itprune.report import LAST, Totals
from itprune.trained import whole_weights

STATE = "itprune"
"""Name of the calibration in trainer_state.json: a run that goes on takes it from there."""
CALIBRATION_BATCH = 4


class PrunerCallback(TrainerCallback):
    """Takes a pruner through a training.

    Args:
        attached: what `attach` returned. Attach after PEFT has wrapped the model: TRL does so in
            the trainer's constructor, so attach to `trainer.model`.
        processor: saved into every checkpoint, unless the trainer has it as `processing_class`.
        calibration_samples: samples of the training data to calibrate on before the first step, so
            that `keep` is met on average; 0: not at all. What is calibrated already stays.
    """

    def __init__(
        self,
        attached: Attached,
        processor: ProcessorMixin | None = None,
        *,
        calibration_samples: int = 256,
    ) -> None:
        self.attached = attached
        self.processor = processor
        self.calibration_samples = calibration_samples
        self._tuned: tuple[str | None, bool] = (None, False)
        self._history: Sequence[Mapping[str, float]] = ()
        self._sums = [0] * 5
        self._trained: deque[float] = deque(maxlen=LAST)
        self._evaluated: tuple[float, ...] = ()

    def add_to(self, trainer: Trainer) -> PrunerCallback:
        """Joins a trainer in front of TensorBoard and the like, so that they see the kept shares.

        `trainer.add_callback` would put it behind them, and the shares into the trainer's state
        alone. Labels that are placeholders of visual tokens, which TRL leaves in `messages` data,
        are ignored from here on, and not counted among the tokens the loss is divided by.
        """
        trainer.callback_handler.callbacks.insert(0, self)
        ids = find_family(base_model(trainer.model)).visual_token_ids
        trainer.data_collator = TextLabels(trainer.data_collator, ids)
        return self

    # ------------------------------------------------------------------------ what a Trainer calls
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                "several GPUs in one process (nn.DataParallel) cannot be pruned; start the script "
                "with `accelerate launch` or `torchrun`, or show it one GPU (CUDA_VISIBLE_DEVICES)"
            )
        model = kwargs["model"]
        inner = base_model(model)
        inner.add_model_tags([TAG])  # into whatever card the trainer or PEFT writes
        self._tuned = inner.name_or_path, inner is not model
        if state.global_step and isinstance(model, PreTrainedModel) and not is_sharded():
            refill(model, checkpoint_folder(args, state), state.log_history)
        stored = state.stateful_callbacks.get(STATE)
        if stored is not None:
            self.attached.calibration = Calibration.from_dict(stored)
        elif self.attached.calibration is None and self.attached.method.calibrates:
            self._calibrate(args, state, kwargs["train_dataloader"])
        if self.attached.calibration is not None:
            state.stateful_callbacks[STATE] = self.attached.calibration.to_dict()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.attached.set_step(state.global_step, state.max_steps, args.seed)
        self.attached.totals.reset()  # forwards between the steps belong to none

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        totals = self.attached.totals
        self._sums = [a + b for a, b in zip(self._sums, _sums_of(totals), strict=True)]
        self._trained.extend(totals.shares)
        totals.reset()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        evaluated = [name for name in logs if name.startswith("eval_") and name.endswith("_loss")]
        if "loss" in logs:
            shares, self._sums = self._shares(self._sums, args.device), [0] * 5
        elif evaluated:  # eval_loss, or eval_NAME_loss of one data set among several
            totals = self.attached.totals
            self._evaluated = tuple(totals.shares)
            found = self._shares(_sums_of(totals), args.device)
            shares = {evaluated[0].removesuffix("loss") + name: v for name, v in found.items()}
            totals.reset()
        else:
            return
        logs |= shares
        state.log_history[-1] |= shares
        self._history = state.log_history

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._save(checkpoint_folder(args, state), args.should_save)

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not is_sharded():  # a checkpoint is pushed by one process alone, which cannot gather
            self._save(Path(args.output_dir), args.should_save)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.attached.set_step(state.max_steps, state.max_steps, args.seed)
        folder = Path(args.output_dir)
        self._save(folder, args.should_save)
        if args.should_save and is_ours(folder):
            self._write_card(folder)

    # ------------------------------------------------------------------------ what a user may call
    def save(self, folder: str | Path) -> None:
        """Completes a folder with the model's weights: pruner, processor and model card.

        Checkpoints and the trainer's output folder are completed without it. Under ZeRO-3 and
        FSDP every process must call it.
        """
        writes = not is_initialized() or get_rank() == 0
        self._save(Path(folder), writes)
        if writes:
            self._write_card(Path(folder))

    # ------------------------------------------------------------------------ parts
    def _save(self, folder: Path, writes: bool) -> None:
        weights = whole_weights(self.attached.method)
        if writes:
            save_pruner(folder, self.attached, weights=weights)
            if self.processor is not None:
                self.processor.save_pretrained(folder)

    def _write_card(self, folder: Path) -> None:
        kept = KeptShares.of(self._evaluated, "evaluation")
        kept = kept or KeptShares.of(self._trained, "the last ones of the training")
        base, adapter = self._tuned
        write_card(folder, base=base, adapter=adapter, history=self._history, kept=kept)

    def _calibrate(self, args: Any, state: Any, loader: DataLoader[Any]) -> None:
        """At the target after training; every process reads the same samples."""
        self.attached.set_step(state.max_steps, state.max_steps, args.seed)
        if self.attached.keep == 1.0 or not self.calibration_samples:
            return
        if isinstance(loader.dataset, IterableDataset):
            warnings.warn(
                "a stream is not calibrated on, so `keep` is not met on average; call "
                "`calibrate(attached, batches)` before `trainer.train()`",
                stacklevel=2,
            )
            return
        with torch.autocast(args.device.type, dtype=torch.bfloat16, enabled=args.bf16):
            batches = spread_batches(loader, self.calibration_samples)
            calibrate(self.attached, batches, limit=self.calibration_samples)

    def _shares(self, sums: Sequence[int], device: torch.device) -> dict[str, float]:
        """What all processes kept, from sums over forwards that were pruned."""
        whole = torch.tensor(sums, dtype=torch.float32, device=device)
        if is_initialized():
            all_reduce(whole)
        visual, stage1, stage2, layers, possible = whole.tolist()
        shares = {"keep": float(self.attached.keep)} if self.attached.keep is not None else {}
        if visual:
            shares["kept_stage1"] = stage1 / visual
            shares["kept_stage2"] = stage2 / visual
            shares["kept_average"] = layers / possible
        return {name: round(value, 4) for name, value in shares.items()}


class TextLabels:
    """A collator whose labels have no placeholders of visual tokens: they teach nothing, and where
    they stand is not there to be supervised once tokens are dropped."""

    def __init__(self, collator: Callable[[Any], Any], visual_ids: Sequence[int]) -> None:
        self.collator = collator
        self.visual_ids = torch.tensor(visual_ids)

    def __call__(self, samples: Any) -> Any:
        batch = self.collator(samples)
        if "labels" in batch:
            visual = torch.isin(batch["labels"], self.visual_ids)
            batch["labels"] = batch["labels"].masked_fill(visual, IGNORE)
        return batch


def checkpoint_folder(args: Any, state: Any) -> Path:
    """Where a Trainer puts the checkpoint of the step it is at."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def is_sharded() -> bool:
    """DeepSpeed and FSDP have checkpoints of their own, and read them themselves."""
    kind = AcceleratorState().distributed_type
    return kind in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def refill(model: PreTrainedModel, folder: Path, history: Sequence[Any]) -> None:
    """Gives a model without adapters, in a run that goes on, the weights of its checkpoint.

    A Trainer fills it by the names of its modules, a file holds those the model was published with
    (in LLaVA all are others), and what does not match stays as it was.

    Args:
        model: to be filled.
        folder: where the checkpoint is looked for; elsewhere there may be one of another run.
        history: what was logged until it was saved.
    """
    if not (folder / TRAINER_STATE).is_file() or history_of(folder) != history:
        warnings.warn(
            f"going on from a checkpoint that is not {folder}: weights that files name otherwise "
            "than modules are not read from it; resume from a checkpoint in `output_dir`",
            stacklevel=2,
        )
        return
    saved = type(model).from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    model.load_state_dict(saved.state_dict(), strict=False)


def spread_batches(loader: DataLoader[Any], count: int) -> Iterable[Mapping[str, Tensor]]:
    """Batches of samples spread evenly over a loader's data, made as the loader makes its own."""
    data: Any = loader.dataset
    count = min(count, len(data))
    chosen: Any = Subset(data, [i * len(data) // count for i in range(count)])
    return DataLoader(
        chosen,
        batch_size=CALIBRATION_BATCH,
        collate_fn=loader.collate_fn,
        generator=torch.Generator(),  # leaves the run's own random numbers alone
    )


def _sums_of(totals: Totals) -> list[int]:
    return [
        totals.visual_in,
        totals.visual_stage1,
        totals.visual_stage2,
        totals.visual_layer_tokens,
        totals.visual_in * totals.layers,
    ]
