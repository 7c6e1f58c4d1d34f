"""PruneTrainer: transformers' Trainer plus what pruning needs, and nothing else.

Added are: the numbers beside the loss, bad samples taken out of batches, and checkpoints that carry
the pruner (train/saving.py). The keep schedule moves in a callback.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from train.bad_samples import BadSamples
from train.budgets import EvaluatingTrainer
from train.card import CardTrainer
from train.data.collate import BAD, PLACES
from train.distill import DistillingTrainer
from train.feeding import FeedingTrainer
from train.guards.guard import GuardedTrainer
from train.meter import Meter
from train.model import limit_input_grads
from train.optim import RatesTrainer
from train.saving import SavingTrainer


class PruneTrainer(
    GuardedTrainer,
    RatesTrainer,
    FeedingTrainer,
    EvaluatingTrainer,
    DistillingTrainer,
    CardTrainer,
    SavingTrainer,
):
    """Trainer of a dense or pruned model.

    Args:
        meter: collects the numbers logged beside the loss.
        bad: the samples that were skipped.
        kwargs: what its bases take.
    """

    def __init__(
        self,
        *args: Any,
        meter: Meter,
        bad: BadSamples,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # Some families are marked as if they did not hand the count of supervised tokens on to
        # their loss. They do, and without it batches of uneven answers would not add up.
        self.model_accepts_loss_kwargs = True
        self.meter = meter
        self.bad = bad
        self.places: list[str] = []
        """Where the samples of the current step come from."""

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        self.places = []
        return super().get_batch_samples(self._good(epoch_iterator), *args, **kwargs)

    def _good(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            found = batch.pop(BAD)
            self.places += batch.pop(PLACES, [])
            self.bad.meet(found)
            if "input_ids" not in batch:
                self.bad.stop(found)
            self.meter.batch(batch)
            yield batch

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(model, self.checked(inputs), *args, **kwargs)
        if self.method is None or not model.training or not self.method.idle:
            return found
        return found + no_gradient(self.method)

    def checked(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch as the model takes it; those of an evaluation still carry their bad samples.

        Raises:
            ValueError: it holds nothing else.
        """
        found = inputs.pop(BAD, None)
        inputs.pop(PLACES, None)
        if "input_ids" not in inputs:
            raise ValueError(f"data.val: too many bad samples, such as {found[-1][1:]}")
        return inputs

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.meter.pause()
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        self.meter.resume()
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self.bad.settle()
            logs |= self.numbers()
            logs["bad_samples"] = len(self.bad)
        super().log(logs, *args, **kwargs)

    def numbers(self) -> dict[str, float]:
        """What is logged beside the loss, of all ranks since the last call."""
        return self.meter.read(self.accelerator)


def no_gradient(method: nn.Module) -> Any:
    """A zero that gives every trained part of a method, idle in a step at keep 1.0, a gradient of
    zero: DDP waits for one, and optimizers treat none otherwise than zero."""
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in method.parameters())
    return sum(0.0 * part.sum() for part in parts if part.requires_grad)


class StepCallback(TrainerCallback):  # type: ignore[misc]
    """Moves the keep schedule and the meter's clock."""

    def __init__(self, meter: Meter, attached: Any | None) -> None:
        self.meter = meter
        self.attached = attached

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.attached is not None:
            self.attached.set_step(state.global_step, state.max_steps, args.seed)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.gradient_checkpointing:
            reentrant = args.gradient_checkpointing_kwargs["use_reentrant"]
            limit_input_grads(kwargs["model"], reentrant)
        self.meter.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.step()

    def _aside(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Logging and saving are not part of a step's time."""
        self.meter.aside()

    on_log = on_save = _aside
