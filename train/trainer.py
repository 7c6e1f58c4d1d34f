"""PruneTrainer: transformers' Trainer plus what pruning needs, and nothing else.

Added are: the numbers beside the loss, bad samples taken out of batches, and checkpoints that carry
the pruner. The keep schedule moves in a callback.

Reading a checkpoint back is ours, too: Trainer fills a model by the names of its modules, a file
holds those the model was published with, and what does not match would stay as it was silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from train.bad_samples import BadSamples
from train.data.collate import BAD
from train.meter import Meter
from train.model import base_of, load_whole
from train.pruning import load_parts


class PruneTrainer(Trainer):  # type: ignore[misc]
    """Trainer of a dense or pruned model.

    Args:
        meter: collects the numbers logged beside the loss.
        bad: the samples that were skipped.
        save_beside: writes pruner, processor and recipe into a folder (main process only); it is
            handed the pruner's weights where they had to be gathered from several ranks.
        method: what is attached, if it has parts that train.
    """

    def __init__(
        self,
        *args: Any,
        meter: Meter,
        bad: BadSamples,
        save_beside: Callable[[Path, Mapping[str, Tensor] | None], None],
        method: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # Some families are marked as if they did not hand the count of supervised tokens on to
        # their loss. They do, and without it batches of uneven answers would not add up.
        self.model_accepts_loss_kwargs = True
        self.meter = meter
        self.bad = bad
        self.save_beside = save_beside
        self.method = method
        self._parts: dict[str, Tensor] | None = None

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        return super().get_batch_samples(self._good(epoch_iterator), *args, **kwargs)

    def _good(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            found = batch.pop(BAD)
            self.bad.meet(found)
            if "input_ids" not in batch:
                self.bad.stop(found)
            self.meter.batch(batch)
            yield batch

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, self.checked(inputs), *args, **kwargs)

    def checked(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch as the model takes it; those of an evaluation still carry their bad samples.

        Raises:
            ValueError: it holds nothing else; or it is all text under ZeRO-3, whose ranks must run
                the same modules in the same order, those of a method included.
        """
        found = inputs.pop(BAD, None)
        if "input_ids" not in inputs:
            raise ValueError(f"data.val: too many bad samples, such as {found[-1][1:]}")
        if (
            self.method is not None
            and "pixel_values" not in inputs
            and is_deepspeed_zero3_enabled()
        ):
            raise ValueError(
                "trainer.deepspeed: under ZeRO-3 a method with trained parts needs an image in "
                "every batch; use ZeRO-2, or leave text-only samples out"
            )
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.method is not None and is_deepspeed_zero3_enabled():
            self._parts = gather_zero3(self.method)
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.save_beside(Path(output_dir or self.args.output_dir), self._parts)
        self._parts = None

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Takes the pruner's weights, which have a file of their own, out of a whole model's."""
        if self.method is not None and self.args.should_save:
            prefix = next(n for n, m in self.model.named_modules() if m is self.method)
            gathered = state_dict is not None
            rest, parts = split_parts(state_dict or self.model.state_dict(), prefix)
            if gathered and self._parts is None:
                self._parts = parts
            if not isinstance(self.model, PeftModel):  # which picks what it saves itself
                state_dict = rest
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled and not isinstance(self.model, PeftModel):
            load_whole(self.model, resume_from_checkpoint)
            return
        trains = [(p, p.requires_grad) for p in self.model.parameters()]
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for parameter, before in trains:  # PEFT unfreezes whatever an adapter's file holds
            parameter.requires_grad_(before)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()  # that includes the pruner
            return
        if isinstance(self.model, PeftModel):
            super()._load_best_model()
        else:
            load_whole(self.model, best)
        if self.method is not None:
            load_parts(self.method, Path(best))


def split_parts(
    state: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Divides a state dict into the model's weights and the pruner's, these by their own names.

    Args:
        state: all weights.
        prefix: name of the pruner in the model.
    """
    start = f"{prefix}."
    model = {name: value for name, value in state.items() if not name.startswith(start)}
    parts = {n.removeprefix(start): v for n, v in state.items() if n.startswith(start)}
    return model, parts


def gather_zero3(method: nn.Module) -> dict[str, Tensor]:
    """The whole weights of a module sharded by ZeRO-3; every rank must call it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(method.parameters())):
        return {name: value.detach().cpu().clone() for name, value in method.state_dict().items()}


class StepCallback(TrainerCallback):  # type: ignore[misc]
    """Moves the keep schedule and the meter's clock."""

    def __init__(self, meter: Meter, attached: Any | None) -> None:
        self.meter = meter
        self.attached = attached

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.attached is not None:
            self.attached.set_step(state.global_step, state.max_steps, args.seed)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # transformers makes the inputs of every sub-model require a gradient, the frozen tower's
        # too, which only reentrant checkpointing needs: it would be trained through for nothing.
        if (args.gradient_checkpointing_kwargs or {}).get("use_reentrant") is False:
            base_of(kwargs["model"]).disable_input_require_grads()
        self.meter.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.step()

    def _aside(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Logging and saving are not part of a step's time."""
        self.meter.aside()

    on_log = on_save = _aside
