"""Repeats: a picture that stands several times in a call goes through the tower once.

Benchmarks ask many questions about one picture, and beams bring theirs along. The tower is handed
each picture once; what it makes is laid out again for every place, so nothing behind it can tell.
Only without gradients, and only for towers that work on (n, C, height, width) rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput


@dataclass(frozen=True)
class Repeats:
    """Rows of a tower's call, of which some are the same."""

    first: Tensor
    """(u,) a row of each picture."""
    rows: Tensor
    """(n,) which of the u stands at each row."""

    @classmethod
    def among(cls, pixels: Tensor, arguments: Iterable[Any]) -> Repeats | None:
        """Looks for equal rows.

        Args:
            pixels: (n, C, height, width).
            arguments: of the call; tensors among them have n rows, too.

        Returns:
            None: all rows differ, gradients are wanted, or the arguments are not rows.
        """
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        count = len(pixels) if pixels.ndim == 4 else 0
        if torch.is_grad_enabled() or count < 2:
            return None
        if any(t.ndim == 0 or len(t) != count for t in tensors):
            return None
        rows = _first_equal(tensors)
        first = sorted(set(rows))
        if len(first) == count:
            return None
        return cls(
            torch.tensor(first, device=pixels.device),
            torch.tensor([first.index(row) for row in rows], device=pixels.device),
        )

    def once(self, value: Any) -> Any:
        """(n, …) -> (u, …); what is no tensor stays."""
        return value[self.first] if isinstance(value, Tensor) else value

    def again(self, value: Any) -> Any:
        """(u, …) -> (n, …), of tensors at any depth of a module's output."""
        if isinstance(value, Tensor):
            return value[self.rows]
        if isinstance(value, ModelOutput):
            return type(value)(**{name: self.again(part) for name, part in value.items()})
        if isinstance(value, tuple):
            return tuple(self.again(part) for part in value)
        return value


def _first_equal(tensors: list[Tensor]) -> list[int]:
    """The first row that equals each row; sums tell which are worth comparing."""
    sums = [t.flatten(1).sum(1, dtype=torch.float64).tolist() for t in tensors]
    known: dict[tuple[float, ...], list[int]] = {}
    out = []
    for row, key in enumerate(zip(*sums, strict=True)):
        alike = known.setdefault(key, [])
        same = (i for i in alike if all(torch.equal(t[i], t[row]) for t in tensors))
        found = next(same, row)
        if found == row:
            alike.append(row)
        out.append(found)
    return out
