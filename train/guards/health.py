"""Health: a loss that is no number or has exploded ends the run before it spoils the weights.

All processes compare notes once a step, in one small gather before the optimizer's step, and come
to the same verdict. That reads one number from the device a step; the forward pass of a pruned
model has waited for it several times by then.

A loss has exploded when it is above 100 and above 100 times the median of the last 100 steps.
Guessing gives a cross entropy of 12 at a vocabulary of 150,000, and the jumps that training
recovers from are far smaller.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

WINDOW = 100
TIMES = 100.0


@dataclass(frozen=True)
class Verdict:
    """What all processes agree on after a step."""

    illness: str | None
    """What is wrong, or None."""
    ranks: tuple[int, ...]
    """Where it shows."""
    stop: bool
    """Whether any process was asked to stop."""


class Health:
    """Judges the loss and the gradients of every step.

    Args:
        accelerator: gathers over the processes.
        scaled: whether the loss is scaled for float16, whose gradients may overflow: such a step is
            left out and the scale lowered.
    """

    def __init__(self, accelerator: Any, scaled: bool) -> None:
        self.accelerator = accelerator
        self.scaled = scaled
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._loss: Tensor | None = None

    def add(self, loss: Tensor) -> None:
        """Takes the loss of one batch of the step, a scalar."""
        loss = loss.detach().float().reshape(1)
        self._loss = loss if self._loss is None else self._loss + loss

    def judge(self, norm: Tensor | float | None, stop: bool) -> Verdict:
        """Ends a step; every process must call it.

        Args:
            norm: of the gradients of all processes; DeepSpeed gives -1 for one that is no number.
            stop: whether this process was asked to stop.
        """
        assert self._loss is not None
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if norm is None or self.scaled:
            norm = 0.0
        norms = torch.as_tensor(norm, dtype=torch.float32, device=self._loss.device).reshape(1)
        stops = torch.full_like(self._loss, float(stop))
        told = self.accelerator.gather(torch.cat([self._loss, norms, stops]))
        self._loss = None
        losses, seen, asked = told.reshape(-1, 3).T.tolist()
        illness, ranks = self._judge(losses, seen)
        return Verdict(illness, ranks, any(asked))

    def _judge(
        self, losses: Sequence[float], norms: Sequence[float]
    ) -> tuple[str | None, tuple[int, ...]]:
        odd = tuple(rank for rank, loss in enumerate(losses) if not math.isfinite(loss))
        if odd:
            return f"the loss is {losses[odd[0]]}", odd
        everywhere = tuple(range(len(losses)))
        if any(not math.isfinite(norm) or norm < 0 for norm in norms):
            return "the loss is a number but its gradients are not", everywhere
        mean = statistics.fmean(losses)
        if self._losses:
            usual = statistics.median(self._losses)
            if mean > TIMES * max(usual, 1.0):
                return f"the loss is {mean:,.0f}, its median was {usual:.4g}", everywhere
        self._losses.append(mean)
        return None, ()
