"""How sure one can be of a total: the percentile bootstrap over groups of questions.

All cases of a run are drawn on the same questions, so the difference of two of them is paired. A
mean is drawn quickly; a figure that is none (F1, MME's score) is totalled anew for every draw, and
there are fewer draws of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from itprune.comparing.scoring import DRAWS, drawn_means
from itprune.tasks.base import SCORE, Item, Task

TOTALLED = 500
"""Draws of a figure that is no mean."""

Scores = Sequence[Mapping[str, float]]


class Draws:
    """Draws of a task's questions.

    Args:
        task: totals them.
        items: those that count.
    """

    def __init__(self, task: Task, items: Sequence[Item]) -> None:
        self.task, self.items = task, items
        members: dict[str, list[int]] = {}
        for index, item in enumerate(items):
            members.setdefault(task.group(item), []).append(index)
        self.groups = list(members.values())
        self.is_mean = type(task).total is Task.total and len(self.groups) == len(items)

    @property
    def count(self) -> int:
        """Draws that are made."""
        return DRAWS if self.is_mean else TOTALLED

    def figures(self, scores: Scores) -> Tensor:
        """(n,) headline figures, one a draw.

        Args:
            scores: one for each item.
        """
        if self.is_mean:
            return drawn_means([score[SCORE] for score in scores])
        generator = torch.Generator().manual_seed(0)
        size = len(self.groups)
        drawn = [
            self._total(torch.randint(size, (size,), generator=generator).tolist(), scores)
            for _ in range(TOTALLED)
        ]
        return torch.tensor(drawn, dtype=torch.float64)

    def _total(self, groups: Sequence[int], scores: Scores) -> float:
        chosen = [index for group in groups for index in self.groups[group]]
        total = self.task.total([self.items[i] for i in chosen], [scores[i] for i in chosen])
        return total[self.task.metric]
