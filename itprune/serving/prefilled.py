"""Prefilled: what a forward over several prompts left in its cache, row by row.

Layers may hold different tokens: some were dropped before the language model, some inside it, and a
layer with a window forgets what it has passed. Rows are padded on the left and aligned anyhow; here
every row is told how many entries each layer has of it and where they stand.

Legend: n prompts, S virtual length, L entries of a layer, T tokens of one prompt.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from itprune.engine.cache import PrunedLayer


@dataclass
class Place:
    """One row's entries in every layer."""

    counts: tuple[int, ...]
    """Entries after the prompt."""
    late: tuple[int, ...]
    """By how much position ids lag behind the model's, where kept tokens were renumbered."""
    kinds: tuple[int, ...]
    """Which tokens they are: layers of a prefill with an equal number hold the same."""
    prompt: int
    """T, before pruning."""
    ids: tuple[int, ...]
    """Position ids of the token behind the prompt, one an axis."""
    steps: int = 0
    """Tokens that came since."""

    def length(self, layer: int) -> int:
        """Entries in a layer now."""
        return self.counts[layer] + self.steps


@dataclass(frozen=True)
class Entries:
    """Which of a layer's entries are whose."""

    order: Tensor
    """(n, L) indices of a row's own entries, in their order, others behind them."""
    position: Tensor
    """(n, L) where they stand in their own prompt, before they are ordered."""
    counts: list[int]


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """How far back each layer of a decoder attends; None: to everything.

    Raises:
        ValueError: layers whose cache is no list of keys and values.
    """
    made = DynamicCache(config=config).layers
    types = config.to_dict().get("layer_types") or ()
    known = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in made)
    if not known or "chunked_attention" in types:
        raise ValueError("layers that hold no keys and values cannot share a batch")
    found = [x.sliding_window if isinstance(x, DynamicSlidingWindowLayer) else None for x in made]
    return tuple(found) or (None,) * config.num_hidden_layers


class Prefilled:
    """The rows of a prefill's cache, which is emptied as they are taken.

    Args:
        cache: after the forward.
        mask: (n, S) bool, False at padding.
        ids: (axes, n) position ids of the tokens that follow.
        windows: of each layer.
    """

    def __init__(
        self, cache: Cache, mask: Tensor, ids: Tensor, windows: Sequence[int | None]
    ) -> None:
        self._layers: list[Any] = cache.layers
        self._mask = mask
        self._memo: dict[Hashable, Entries] = {}
        pads = mask.shape[1] - mask.sum(1)
        self._pads = pads[:, None]
        kinds: dict[int, int] = {}
        self._entries = [self._read(x, w) for x, w in zip(self._layers, windows, strict=True)]
        kind = [kinds.setdefault(id(entries), len(kinds)) for entries in self._entries]
        late = [self._late(layer) for layer in self._layers]
        lengths = (mask.shape[1] - pads).tolist()
        self.rows = [
            Place(
                counts=tuple(entries.counts[row] for entries in self._entries),
                late=tuple(lags[row] for lags in late),
                kinds=tuple(kind),
                prompt=length,
                ids=tuple(own),
            )
            for row, (length, own) in enumerate(zip(lengths, ids.T.tolist(), strict=True))
        ]

    def _read(self, layer: Any, window: int | None) -> Entries:
        """Read once for layers that hold the same tokens."""
        length = layer.keys.shape[-2]
        key = (layer.history if isinstance(layer, PrunedLayer) else None, length, window)
        if key not in self._memo:
            self._memo[key] = self._entries_of(layer, length, window)
        return self._memo[key]

    def _entries_of(self, layer: Any, length: int, window: int | None) -> Entries:
        samples, end = self._mask.shape
        if isinstance(layer, PrunedLayer):
            assert layer.position is not None
            assert layer.filled is not None
            position, own = layer.position, layer.filled & self._mask.gather(1, layer.position)
        else:
            position = torch.arange(end - length, end, device=self._mask.device)
            position, own = position.expand(samples, -1), self._mask[:, end - length :]
        if window is not None:
            own = own & (position > end - window)  # what the next token still sees
        order = (~own).int().argsort(dim=1, stable=True)
        return Entries(order, position - self._pads, own.sum(1).tolist())

    def _late(self, layer: Any) -> list[int]:
        late = layer.late if isinstance(layer, PrunedLayer) else None
        return [0] * len(self._mask) if late is None else late.tolist()

    def take(self, layer: int, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of a layer: keys and values (n, H, L, d), left aligned, and positions (n, L).

        The layer is empty afterwards.
        """
        entries, source = self._entries[layer], self._layers[layer]
        width = max(entries.counts[row] for row in rows)
        chosen = torch.tensor(rows, device=source.keys.device)
        order = entries.order[chosen, :width]
        along = order[:, None, :, None]
        keys, values = (
            t[chosen].gather(2, along.expand(-1, t.shape[1], -1, t.shape[3]))
            for t in (source.keys, source.values)
        )
        source.keys = source.values = None
        return keys, values, entries.position[chosen].gather(1, order)
