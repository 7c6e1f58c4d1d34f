"""Meter: the numbers logged beside the loss.

samples: of a step, over all ranks; tokens_in: their tokens before pruning; kept_stage1,
kept_stage2: share of the visual tokens left after each stage; layer_average: share of all tokens,
averaged over the language model's layers; tokens_per_s (tokens_in by time), step_time, peak_mb (the
largest rank's memory).
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

MB = 1024 * 1024


class Meter:
    """Sums over the steps since the last log; one per process.

    Args:
        attached: the pruner, or None for a dense run.
        visual_ids: the placeholders of visual tokens.
    """

    def __init__(self, attached: Any | None, visual_ids: Sequence[int]) -> None:
        self.attached = attached
        self.visual_ids = torch.tensor(visual_ids)
        self._seen: list[torch.Tensor] = []
        self._steps = 0
        self._time = 0.0
        self._sums = [0.0] * 5
        self._layers = 0
        self._layered = (0, 0)
        self._mark = time.perf_counter()

    def start(self) -> None:
        """The first step begins."""
        self._reset()
        self._mark = time.perf_counter()

    def batch(self, batch: dict[str, torch.Tensor]) -> None:
        """A batch enters; counted as tensors so that a device is not waited for."""
        ids = batch["input_ids"]
        visual = torch.isin(ids, self.visual_ids.to(ids.device))
        tokens = batch["attention_mask"].sum()
        self._seen.append(torch.stack([torch.full_like(tokens, len(ids)), tokens, visual.sum()]))

    def step(self) -> None:
        """An optimizer step ends."""
        now = time.perf_counter()
        self._time += now - self._mark
        self._mark = now
        self._steps += 1

    def aside(self) -> None:
        """Time until here belongs to no step."""
        self._mark = time.perf_counter()

    def read(self, accelerator: Any) -> dict[str, float]:
        """The numbers of all ranks since the last call; every rank must call it."""
        device = accelerator.device
        seen = torch.stack(self._seen).sum(0).tolist() if self._seen else [0, 0, 0]
        self._collect()
        precise = torch.float32 if device.type == "mps" else torch.float64
        own = torch.tensor([*seen, *self._sums], dtype=precise, device=device)
        samples, *sums = accelerator.reduce(own, "sum").tolist()
        peaks = torch.tensor([self._time, peak_memory(device), float(self._layers)]).to(device)
        seconds, peak, layers = accelerator.gather(peaks[None]).amax(0).tolist()
        self._layers = int(layers)  # a rank may have had text only so far
        steps = max(self._steps, 1)
        logs = {
            "samples": samples / steps,
            "tokens_in": sums[0] / steps,
            **self._shares(*sums),
            "tokens_per_s": sums[0] / max(seconds, 1e-9),
            "step_time": seconds / steps,
            "peak_mb": peak,
        }
        self._reset()
        return {name: round(value, 4) for name, value in logs.items()}

    def counts(self) -> tuple[int, int]:
        """This rank's visual tokens in pruned forwards since the start, and those kept, both summed
        over the language model's layers."""
        self._collect()
        return self._layered

    def pause(self) -> None:
        """Forwards that follow (an evaluation) do not belong to a step."""
        self._collect()

    def resume(self) -> None:
        """Steps go on."""
        if self.attached is not None:
            self.attached.totals.reset()
        self._mark = time.perf_counter()

    def _collect(self) -> None:
        """Adds what the pruner counted since the last reset."""
        if self.attached is None:
            return
        t = self.attached.totals
        found = (t.tokens_in, t.visual_in, t.visual_stage1, t.visual_stage2, t.layer_tokens)
        self._sums = [a + b for a, b in zip(self._sums, found, strict=True)]
        self._layers = max(self._layers, t.layers)
        before, kept = self._layered
        self._layered = (before + t.visual_in * t.layers, kept + t.visual_layer_tokens)
        t.reset()

    def _shares(
        self,
        tokens: float,
        visual: float,
        tokens_pruned: float,
        visual_pruned: float,
        stage1: float,
        stage2: float,
        layer: float,
    ) -> dict[str, float]:
        """Shares from sums over ranks; forwards the pruner left alone kept everything."""
        if self.attached is None:
            return {"layer_average": 1.0}
        layers = max(self._layers, 1)
        whole = (tokens - tokens_pruned) * layers
        shares = {"layer_average": (layer + whole) / max(tokens * layers, 1.0)}
        if visual:
            rest = visual - visual_pruned
            shares["kept_stage1"] = (stage1 + rest) / visual
            shares["kept_stage2"] = (stage2 + rest) / visual
        if self.attached.keep is not None:
            shares["keep"] = float(self.attached.keep)
        return shares

    def _reset(self) -> None:
        self._seen, self._steps, self._time = [], 0, 0.0
        self._sums = [0.0] * 5
        if self.attached is not None:
            self.attached.totals.reset()


def peak_memory(device: torch.device) -> float:
    """Largest memory so far, in MB: the device's, or the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MB if sys.platform == "darwin" else peak / 1024
