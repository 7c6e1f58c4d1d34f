"""Counts the bytes that a process hands to collectives, whoever calls them: DDP, ZeRO or FSDP."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SPACES = ("c10d", "_c10d_functional")
"""Where torch's collectives live."""


class Bytes(TorchDispatchMode):
    """Sums the tensors of every collective that runs inside, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        space, _, name = func.name().partition("::")
        if space in SPACES:
            tensors = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
            self.sent[name] += sum(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


@contextmanager
def counting(path: Path, wanted: bool) -> Iterator[None]:
    """Writes what runs inside sends to `path`, where that is wanted."""
    if not wanted:
        yield
        return
    with torch.autograd.set_multithreading_enabled(False), Bytes() as counted:
        yield
    path.write_text(json.dumps(counted.sent))
