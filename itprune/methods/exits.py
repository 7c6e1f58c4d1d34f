"""Exit votes of a calibration, and the bias that makes them average a share of the layers.

A voter (a sample, or a batch that exits together) leaves after the first layer whose margin plus
the bias is positive. Its running maximum over the layers decides alone, so every bias's outcome is
known after one pass without any exit. Legend: R voters, L layers, K biases.
"""

from __future__ import annotations

import torch
from torch import Tensor

POINTS = 512


class Votes:
    """Collects margins layer by layer, batch after batch.

    Args:
        first: the layer that opens a batch.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self._batches: list[list[tuple[Tensor, Tensor]]] = []

    def add(self, layer: int, margin: Tensor, visual: Tensor) -> None:
        """Notes (B,) margins and (B,) visual tokens after one layer."""
        if layer == self.first:
            self._batches.append([])
        self._batches[-1].append((margin.float().cpu(), visual.cpu()))

    def table(self) -> tuple[Tensor, Tensor]:
        """(R, L) margins and (R,) visual tokens of all samples with images.

        Raises:
            ValueError: there was none.
        """
        if not self._batches:
            raise ValueError("calibration needs samples with images, and found none")
        margin = torch.cat([torch.stack([m for m, _ in batch], 1) for batch in self._batches])
        weight = torch.cat([batch[0][1] for batch in self._batches])
        return margin[weight > 0], weight[weight > 0]


def exit_table(
    margin: Tensor, weight: Tensor, first: int, depth: int
) -> tuple[list[float], list[float]]:
    """What each bias leaves of the visual tokens, averaged over the LLM's layers.

    Args:
        margin: (R, L) logit to exit minus logit to stay after consecutive layers, without exits.
        weight: (R,) visual tokens of each voter.
        first: 0-based layer of the first column.
        depth: LLM layers.

    Returns:
        Shares, strictly descending from 1 (nobody exits), and their biases, ascending.
    """
    best = margin.double().cummax(1).values
    levels = best.flatten().unique()  # ascending
    step = max(len(levels) / POINTS, 1.0)
    levels = levels[(torch.arange(min(len(levels), POINTS)) * step).long()]
    middle = (levels[1:] + levels[:-1]) / 2
    edges = torch.cat([levels[:1] - 1, middle, best.max()[None] + 1]).flip(0)  # (K,) = -bias
    layers_run = torch.searchsorted(best, edges.expand(len(best), -1).contiguous(), right=True)
    layers_run = layers_run + first + 1
    layers_run = torch.where(layers_run > first + margin.shape[1], depth, layers_run)
    part = weight.double() / weight.sum()
    share = (layers_run * part[:, None]).sum(0) / depth
    new = torch.ones_like(share, dtype=torch.bool)
    new[1:] = share[1:] < share[:-1] - 1e-9
    return _rounded(share[new]), _rounded(-edges[new])


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]
