"""calibrate(attached, batches): fit the rule of a pruner at work to the targets it is to meet."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from itprune.attach import Attached
from itprune.calibration import Calibration
from itprune.engine.request import PIXELS
from itprune.families.base import Family


@torch.no_grad()
def calibrate(
    attached: Attached, batches: Iterable[Mapping[str, Any]], limit: int = 256
) -> Calibration:
    """Measures what the raw rule keeps, so that the `keep` in force is met on average.

    With a `keep` that moves or is drawn, every target of it is. A method may go through the batches
    several times, e.g. once per stage.

    Args:
        attached: an attached model; its `calibration` is set.
        batches: collated model inputs; at most `limit` rows are read.
        limit: rows to use.

    Raises:
        ValueError: no batch had an image, or the method has nothing to calibrate.
    """
    if not attached.method.calibrates:
        raise ValueError(f"method {attached.config.method!r} has nothing to calibrate")
    rows = _first_rows(batches, limit)
    if not rows:
        raise ValueError("calibration needs samples with images, and found none")
    budgets = _budgets(attached)
    with attached.aside(budgets[0]):
        found = attached.method.calibrate(_Trial(attached, rows, budgets))
    samples = sum(_with_images(attached._engine.family, batch["input_ids"]) for batch in rows)
    found = dataclasses.replace(found, samples=samples, host=attached.method.host.to_dict())
    attached.calibration = found
    return found


def _budgets(attached: Attached) -> tuple[float | None, ...]:
    """The targets to meet, that in force first; where there is nothing to choose, nothing is to be
    met."""
    several = attached.config.budgets if len(attached.config.budgets) > 1 else ()
    targets = tuple(dict.fromkeys(k for k in (attached.keep, *several) if k != 1.0))
    return targets or (attached.keep,)


def _with_images(family: Family, ids: Tensor) -> int:
    """How many of (B, S) rows have images or videos."""
    visual = torch.isin(ids, torch.tensor(family.visual_token_ids, device=ids.device))
    return int(visual.any(1).sum())


class _Trial:
    """What a method does with the calibration batches."""

    def __init__(
        self,
        attached: Attached,
        batches: list[Mapping[str, Any]],
        budgets: tuple[float | None, ...],
    ) -> None:
        self.attached, self.batches, self.budgets = attached, batches, budgets
        self.device = attached._engine.family.model.device
        self.dense: list[Tensor] = []

    def run(self) -> None:
        """Forwards every calibration batch."""
        for batch in self.batches:
            self._forward(batch)

    def fidelity(self) -> float:
        """exp(-KL(dense | now)) of the next-token distribution, averaged over all samples."""
        method = self.attached.method
        if not self.dense:
            keep = method.keep
            method.share(1.0)
            recorder, method.recorder = method.recorder, None
            self.dense = [self._forward(batch).log_softmax(-1) for batch in self.batches]
            method.share(keep)
            method.recorder = recorder
        total, count = 0.0, 0
        for batch, dense in zip(self.batches, self.dense, strict=True):
            now = self._forward(batch).log_softmax(-1)
            divergence = (dense.exp() * (dense - now)).sum(-1)
            total += float(divergence.neg().exp().sum())
            count += len(divergence)
        return total / count

    def _forward(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, vocabulary) float32 logits of each prompt's last token."""
        device = self.device
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k != "labels"}
        inputs = {name: tensor.to(device) for name, tensor in tensors.items()}
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        place = torch.arange(mask.shape[1], device=device)
        last = (mask * (place + 1)).argmax(1)
        columns = last.unique()
        # By its outermost part: sharded weights (FSDP) are gathered from there.
        model = self.attached.model
        logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
        return logits[torch.arange(len(last)), torch.searchsorted(columns, last)].float()


def _first_rows(batches: Iterable[Mapping[str, Any]], limit: int) -> list[Mapping[str, Any]]:
    rows, count = [], 0
    for batch in batches:
        if all(batch.get(name) is None for name in PIXELS):
            continue
        rows.append(batch)
        count += len(batch["input_ids"])
        if count >= limit:
            break
    return rows
