"""Self-distillation: the model on all tokens teaches itself on the kept ones.

Every n-th step the batch runs first on all tokens, in evaluation mode and without gradients; the
step's loss is then its own plus `weight` times the divergence of the two answers,

    T^2 KL(softmax(whole / T) || softmax(pruned / T)),

at supervised positions, divided as the loss itself is: by the supervised tokens of all ranks and of
all batches of the step. A step whose budget is 1.0 has nothing to learn from itself. Steps and
budgets are the same on every rank, so all of them run the second forward or none.
Shapes: M supervised positions of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer

from itprune import Attached
from train.recipe.sections import DistillSection
from train.supervised import rows_of, supervised


class Distiller:
    """The teacher, and what it found since the last log.

    Args:
        attached: the pruner.
        section: how often and how much.
    """

    def __init__(self, attached: Attached, section: DistillSection) -> None:
        self.attached, self.section = attached, section
        self._found = torch.zeros(2)  # divergence and positions, summed

    def teaches(self, step: int) -> bool:
        """Whether there is a lesson in the step after `step` ones."""
        return (step + 1) % self.section.every == 0 and self.attached.keep != 1.0

    @torch.no_grad()
    def answer(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """(M, V) logits on all tokens."""
        mask, _ = supervised(inputs["labels"])
        with self.attached.aside(1.0):
            return rows_of(model(**inputs, use_cache=False).logits, mask)

    def divergence(self, pruned: Tensor, whole: Tensor) -> Tensor:
        """Sum over the positions; noted for the log.

        Args:
            pruned: (M, V) logits that learn.
            whole: (M, V) logits on all tokens.
        """
        heat = self.section.temperature
        learns, knows = (F.log_softmax(rows.float() / heat, -1) for rows in (pruned, whole))
        found = F.kl_div(learns, knows, reduction="sum", log_target=True) * heat**2
        seen = torch.stack([found.detach(), found.new_tensor(len(whole))])
        self._found = self._found.to(seen.device) + seen
        return found

    def read(self, accelerator: Any) -> dict[str, float]:
        """`distill`: divergence of a position, of all ranks since the last call, if there was a
        lesson; every rank must call it."""
        found = self._found.to(accelerator.device)
        total, count = accelerator.reduce(found, "sum").tolist()
        self._found = torch.zeros(2)
        return {"distill": total / count} if count else {}


class DistillingTrainer(Trainer):  # type: ignore[misc]
    """Trainer of a model that may teach itself.

    Args:
        distill: the teacher; None: there is none.
    """

    def __init__(self, *args: Any, distill: Distiller | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.distill = distill

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        **kwargs: Any,
    ) -> Any:
        distill = self.distill
        if distill is None or not model.training or not distill.teaches(self.state.global_step):
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        mask, _ = supervised(inputs["labels"])
        whole = distill.answer(model, inputs)  # first: nothing is kept for its way back
        loss, outputs = super().compute_loss(model, inputs, True, **kwargs)
        divergence = distill.divergence(rows_of(outputs.logits, mask), whole)
        share = self._share(kwargs.get("num_items_in_batch"), whole)
        loss = loss + distill.section.weight * share * divergence
        return (loss, outputs) if return_outputs else loss

    def _share(self, items: Any, whole: Tensor) -> Any:
        """What one position weighs in the loss, which gradients' averaging over ranks divides."""
        if items is None:
            return 1 / max(len(whole), 1)
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return ranks / items

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.distill is not None:
            logs |= self.distill.read(self.accelerator)
        super().log(logs, *args, **kwargs)
