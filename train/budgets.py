"""Evaluation in training: loss and accuracy, at one budget or at several, one after the other.

Accuracy is the share of samples all of whose supervised tokens are the greedy choice, given the
right ones before them. Token by token that is what `generate` would write, so it equals the share
of greedy answers that match exactly; but it takes one forward, with logits at supervised positions.
Loss is a mean over supervised tokens, as in training. Both count every sample once, however many
ranks share them, and training goes on as if there had been no evaluation.
Shapes: B samples, S length, M supervised positions of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer
from transformers.integrations import TensorBoardCallback

from itprune import Attached, Draw
from train.recipe.sections import metric
from train.supervised import rows_of, supervised

CURVE = "accuracy_over_keep"
"""TensorBoard: one run per evaluation, whose axis is the budget in percent."""


@dataclass
class Evaluation:
    """What is measured, and how."""

    attached: Attached | None
    """None: a dense run."""
    budgets: tuple[float, ...] = ()
    """`eval.keep`."""

    @property
    def targets(self) -> tuple[float | None, ...]:
        """One pass over the samples each; what has no budget in its name is the first one's."""
        if self.budgets or self.attached is None:
            return self.budgets or (None,)
        drawn = isinstance(self.attached.config.keep, Draw)
        return (self.attached.config.final_keep if drawn else self.attached.keep,)

    def at(self, keep: float | None, counted: bool) -> AbstractContextManager[None]:
        """Forwards inside run at a target."""
        return nullcontext() if self.attached is None else self.attached.aside(keep, counted)

    @torch.no_grad()
    def score(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Runs a batch.

        Returns:
            (B, 3): summed loss, supervised tokens, and 1 where all of these are the greedy choice.
        """
        mask, targets = supervised(inputs["labels"])
        given = {**inputs, "use_cache": False}
        given.pop("skip_logits", None)
        if self.attached is None:  # nobody thins the logits out: the columns where any row learns
            columns = mask.any(0).nonzero()[:, 0]
            given |= {"logits_to_keep": columns, "shift_labels": targets[:, columns]}
            logits = model(**given).logits[mask[:, columns]]
        else:
            logits = rows_of(model(**given).logits, mask)
        answer, sample = targets[mask], mask.nonzero()[:, 0]
        loss = F.cross_entropy(logits.float(), answer, reduction="none")
        wrong = (logits.argmax(-1) != answer).float()
        rows = torch.zeros(len(mask), 3, device=loss.device)
        rows = rows.index_add(0, sample, torch.stack([loss, torch.ones_like(loss), wrong], 1))
        right = (rows[:, 2] == 0) & (rows[:, 1] > 0)
        return torch.stack([rows[:, 0], rows[:, 1], right.float()], 1)


class EvaluatingTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose evaluation is one of budgets.

    Args:
        evaluation: what is measured; None: Trainer's own evaluation loss.
    """

    def __init__(self, *args: Any, evaluation: Evaluation | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.evaluation = evaluation
        self._rows: list[Tensor] | None = None  # (N, 3) of all ranks, in an evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        found: dict[str, float] = super().evaluate(*args, **kwargs)
        if self.evaluation is not None and self.is_world_process_zero():
            boards = (
                c for c in self.callback_handler.callbacks if isinstance(c, TensorBoardCallback)
            )
            writer = next((c.tb_writer for c in boards if c.tb_writer is not None), None)
            if writer is not None and len(self.evaluation.budgets) > 1:
                draw_curve(Path(writer.log_dir), self.state.global_step, self.evaluation, found)
        return found

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Trainer's loop once for each target, its metrics replaced by ours."""
        given = {**kwargs, "metric_key_prefix": metric_key_prefix}
        evaluation = self.evaluation
        if evaluation is None:
            return super().evaluation_loop(*args, **given)
        found: dict[str, float] = {}
        with same_random_state(self.args.device):
            for turn, keep in enumerate(evaluation.targets):
                self._rows = []
                try:
                    with evaluation.at(keep, counted=turn == 0):
                        output = super().evaluation_loop(*args, **given)
                    rows = torch.cat(self._rows).double()
                finally:
                    self._rows = None
                loss, tokens, right = rows.sum(0).tolist()
                values = {"loss": loss / max(tokens, 1), "accuracy": right / max(len(rows), 1)}
                named = [None] * (turn == 0) + [keep] * bool(evaluation.budgets)
                for name in named:
                    found |= {metric(what, name): value for what, value in values.items()}
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in found.items()})
        return output

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """In an evaluation: the batch's rows are noted, and its mean loss is returned."""
        if self._rows is None or self.evaluation is None:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        rows = self.evaluation.score(model, inputs)
        self._rows.append(self.accelerator.gather_for_metrics(rows).cpu())
        loss = rows[:, 0].sum() / rows[:, 1].sum().clamp(min=1)
        return (loss, {}) if return_outputs else loss


@contextmanager
def same_random_state(device: torch.device) -> Iterator[None]:
    """Random numbers go on behind it as if nothing had been drawn; loaders draw their seeds."""
    own = device.type in ("cuda", "xpu")
    devices = [device.index or 0] if own else []
    with torch.random.fork_rng(devices, device_type=device.type if own else "cuda"):
        yield


def draw_curve(folder: Path, step: int, evaluation: Evaluation, found: dict[str, float]) -> None:
    """Writes accuracy over keep as a TensorBoard run of its own, so that TensorBoard lays the
    curves of all evaluations over each other.

    Args:
        folder: TensorBoard's folder of the run.
        step: optimizer steps done.
        evaluation: what was measured.
        found: its metrics, prefix included.
    """
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / CURVE / f"step_{step}")) as writer:
        for keep in sorted(evaluation.budgets):
            writer.add_scalar(CURVE, found[f"eval_{metric('accuracy', keep)}"], round(100 * keep))
