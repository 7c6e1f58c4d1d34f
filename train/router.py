"""Mode `router`: trains the exit routers of DyVTE (arXiv 2411.19628), everything else frozen.

Each step draws one layer, the same on every rank. The batch runs twice, with its images throughout
and with all visual tokens gone after that layer. Where that changed nothing, which is to say that
nearly all greedy answer tokens agree and the answers' loss hardly rose, the layer's router should
say exit, else stay: a cross entropy on features it is handed detached.

The publication runs the layers up to the exit once; two whole forwards take about a quarter more.
Legend: B samples, S length, M answer positions, D LLM width.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from itprune.methods.dyvte import Dyvte, Seen
from train.trainer import PruneTrainer

IGNORE = -100
AGREE = 0.99
"""More than this share of a sample's greedy answer tokens must stay the same."""
WORSE = 1.03
"""An answer's loss must stay below this many times the loss with the image."""


class RouterTrainer(PruneTrainer):
    """Trainer of the routers of an attached DyVTE.

    Args:
        routers: the method; its routers are all that trains.
    """

    def __init__(self, *args: Any, routers: Dyvte, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.routers = routers
        self.model_accepts_loss_kwargs = False  # a mean of rows, not of answer tokens
        self._evaluated = 0
        self._counts = torch.zeros(3)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Sum over the samples by the number of rows, so that a batch may be split at will."""
        inputs = self.checked(inputs)
        layer = self._layer(model.training)
        with self.routers.exit_after(None), torch.no_grad():
            whole = model(**inputs).logits
        # Nothing of the frozen model enters the graph; DDP only synchronises gradients of a step
        # whose forward it saw with gradients on.
        with self.routers.exit_after(layer) as seen:
            outputs = model(**inputs)
        exits, valid = self._labels(inputs["labels"], whole, outputs.logits.detach(), seen)
        logits = self.routers.logits(self._features(inputs["labels"], seen), layer).float()
        each = F.cross_entropy(logits, exits.long(), reduction="none")
        if model.training:
            self._count(logits.detach(), exits, valid)
        loss = (each * valid).sum() / len(each)
        return (loss, outputs) if return_outputs else loss

    def _layer(self, training: bool) -> int:
        """The step's draw; an evaluation goes through the layers in turn."""
        layers = self.routers.exits
        if training:
            return random.Random(f"{self.args.seed} {self.state.global_step}").choice(layers)
        self._evaluated += 1
        return layers[(self._evaluated - 1) % len(layers)]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._evaluated = 0
        return super().evaluate(*args, **kwargs)

    def _features(self, labels: Tensor, seen: Seen) -> Tensor:
        """(B, 2 D); zeros for a batch of text, which still has to meet the other ranks."""
        if seen.features is not None:
            return seen.features
        return torch.zeros(len(labels), 2 * self.routers.host.width, device=labels.device)

    def _labels(
        self, labels: Tensor, whole: Tensor, short: Tensor, seen: Seen
    ) -> tuple[Tensor, Tensor]:
        """(B,) bool: should exit; (B,) bool: has an image and an answer to tell by."""
        if seen.visual is None:
            none = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
            return none, none
        exits, answers = pseudo_labels(labels, whole, short)
        return exits, (seen.visual > 0) & (answers > 0)

    def _count(self, logits: Tensor, exits: Tensor, valid: Tensor) -> None:
        right = (logits[:, 1] > logits[:, 0]) == exits
        counts = torch.stack([(exits & valid).sum(), (right & valid).sum(), valid.sum()])
        self._counts = self._counts.to(counts.device) + counts

    def numbers(self) -> dict[str, float]:
        """Forced exits say nothing about what is kept: instead, how often an exit was right
        (`should_exit`) and how often the router knew (`router_right`)."""
        numbers = {k: v for k, v in super().numbers().items() if k != "layer_average"}
        counts = self._counts.to(self.accelerator.device)
        should, right, total = self.accelerator.reduce(counts, "sum").tolist()
        self._counts = torch.zeros(3)
        total = max(total, 1.0)
        shares = {"should_exit": should / total, "router_right": right / total}
        return {**numbers, **{name: round(share, 4) for name, share in shares.items()}}


def pseudo_labels(labels: Tensor, whole: Tensor, short: Tensor) -> tuple[Tensor, Tensor]:
    """Whether leaving the images out from a layer on did not change a sample's answers.

    Args:
        labels: (B, S), -100 where nothing is learnt.
        whole: logits with the images, (B, S, vocabulary) or (M, vocabulary) at answer positions.
        short: likewise, with the exit.

    Returns:
        (B,) bool, and (B,) the number of answer positions.
    """
    targets = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
    mask = targets != IGNORE
    sample, answer = mask.nonzero()[:, 0], targets[mask]
    rows = [logits if logits.ndim == 2 else logits[mask] for logits in (whole, short)]
    same = rows[0].argmax(-1) == rows[1].argmax(-1)
    sums = torch.zeros(len(labels), 4, device=labels.device)
    losses = [F.cross_entropy(r.float(), answer, reduction="none") for r in rows]
    values = torch.stack([same.float(), *losses, torch.ones_like(losses[0])], 1)
    agreed, loss, loss_short, count = sums.index_add(0, sample, values).unbind(1)
    return (agreed > AGREE * count) & (loss_short < WORSE * loss), count
