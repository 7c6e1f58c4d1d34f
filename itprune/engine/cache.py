"""A KV-cache layer that stores kept tokens only and reports virtual lengths to the outside.

transformers asks a cache how long the sequence is (masks, positions, slicing of the prompt); it
gets the virtual answer, while keys and values hold the physical entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from itprune.engine.rows import Rows


class PrunedLayer(DynamicLayer):
    """Keys and values (B, H, L, d) of kept tokens, with where each stands.

    Attributes:
        position: (B, L) virtual position of each entry.
        filled: (B, L) False for alignment pads.
        virtual_length: what `get_seq_length` reports.
        aligned: True while no pad was ever stored: decoding then needs no mask and no sync.
        history: where the rows of each pruned call began: layers with an equal history hold the
            same tokens and can share a mask.
        late: (B,) by how much position ids lag behind the virtual ones, where kept tokens were
            renumbered; None: nowhere.
        visual: (B, L) which entries are visual tokens; None: not asked for, or none.
    """

    def __init__(self, is_sliding: bool = False) -> None:
        super().__init__()
        self.is_sliding = is_sliding
        self.keys: Any = None
        self.values: Any = None
        self._forget()

    def _forget(self) -> None:
        self.position: Tensor | None = None
        self.filled: Tensor | None = None
        self.virtual_length = 0
        self.aligned = True
        self.history: tuple[int, ...] = ()
        self.late: Tensor | None = None
        self.visual: Tensor | None = None
        self._coming_visual: Tensor | None = None
        self._renumbered_up_to = 0
        self._coming: Rows | None = None

    def expect(self, rows: Rows, start: int, late: Tensor | None = None) -> None:
        """Announces that the next `update` brings `rows`, shared by all layers from `start` on.

        Args:
            rows: what comes.
            start: first layer of those that share them.
            late: (B,) positions saved by renumbering them; None: not renumbered.
        """
        self._coming = rows
        if late is not None:
            self.late = late if self.late is None else self.late + late
            if rows.gap:
                self._renumbered_up_to = self.virtual_length + rows.gap
        self.history = (*self.history, start)

    def mark(self, visual: Tensor) -> None:
        """Tells which of the entries of the next `update`, (B, L) bool, are visual tokens."""
        self._coming_visual = visual

    def update(
        self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores the entries; returns what the layer attends to (packed rows: themselves)."""
        rows, self._coming = self._coming, None
        if rows is None:
            samples, length = key.shape[0], key.shape[-2]
            position = torch.arange(length, device=key.device).expand(samples, length)
            self._note(position, torch.ones_like(position, dtype=torch.bool), length)
            return super().update(key, value)
        self.aligned &= rows.aligned
        self._note(rows.table, rows.filled, rows.length)
        if not rows.packed:
            return super().update(key, value)
        super().update(*(rows.pad(t[0].transpose(0, 1)).transpose(1, 2) for t in (key, value)))
        return key, value

    def _note(self, position: Tensor, filled: Tensor, length: int) -> None:
        position = position + self.virtual_length
        visual, self._coming_visual = self._coming_visual, None
        if visual is not None or self.visual is not None:
            visual = torch.zeros_like(filled) if visual is None else visual
            earlier = self.visual
            if earlier is None and self.filled is not None:
                earlier = torch.zeros_like(self.filled)
            self.visual = visual if earlier is None else torch.cat([earlier, visual], 1)
        if self.position is not None and self.filled is not None:
            position = torch.cat([self.position, position], 1)
            filled = torch.cat([self.filled, filled], 1)
        self.position, self.filled = position, filled
        self.virtual_length += length

    def get_seq_length(self) -> int:
        return self.virtual_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.virtual_length + query_length, 0

    def entries(self) -> Tensor:
        """(B,) entries really stored for each sample."""
        assert self.filled is not None
        return self.filled.sum(1)

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.position is not None and self.filled is not None:
            self.keys, self.values = change(self.keys), change(self.values)
            self.position, self.filled = change(self.position), change(self.filled)
            self.late = None if self.late is None else change(self.late)
            self.visual = None if self.visual is None else change(self.visual)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda t: t[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens of the virtual sequence (negative count; a positive one is the
        length to keep, as older transformers ask)."""
        tokens_to_remove = int(tokens_to_remove)  # some versions hand a tensor
        length = self.virtual_length
        left = length + tokens_to_remove if tokens_to_remove < 0 else tokens_to_remove
        if tokens_to_remove == 0 or left >= length or self.position is None or self.filled is None:
            return
        if self.late is not None and left < self._renumbered_up_to:
            raise ValueError(
                "a cache cannot be cropped into a prompt whose kept tokens were renumbered; set "
                "prune.positions: original"
            )
        stays = (self.position < left) & self.filled
        width = int(stays.sum(1).max())  # entries are ascending, so what stays is on the left
        self.keys, self.values = self.keys[..., :width, :], self.values[..., :width, :]
        self.position, self.filled = self.position[:, :width], stays[:, :width]
        self.visual = None if self.visual is None else self.visual[:, :width]
        self.aligned &= bool(self.filled.all())
        self.virtual_length = left

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = None
        self.is_initialized = False
        self._forget()


def is_pruned(cache: Any) -> bool:
    """Whether some layers of a call's cache hold fewer tokens than it has seen."""
    return isinstance(cache, Cache) and any(isinstance(x, PrunedLayer) for x in cache.layers)


def check_dynamic(cache: Cache) -> None:
    """Refuses a cache that is no list of growing tensors.

    Raises:
        ValueError: a layer that cannot hold another number of tokens than its neighbours.
    """
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, PrunedLayer):
            raise ValueError(
                f"token pruning needs a dynamic KV cache, got {type(layer).__name__}; "
                "leave cache_implementation unset"
            )


def adopt_layers(cache: Cache, start: int, depth: int) -> None:
    """Replaces the dynamic layers `start`.. of a cache by pruned ones, entries included.

    Raises:
        ValueError: a cache that cannot hold a different number of tokens per layer.
    """
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) < depth:
            cache.layers.append(cache.layer_class_to_replicate())
    check_dynamic(cache)
    for index in range(start, depth):
        old = cache.layers[index]
        if isinstance(old, PrunedLayer):
            continue
        new = PrunedLayer(old.is_sliding)
        if old.is_initialized and old.get_seq_length() > 0:
            if old.is_sliding:
                raise ValueError("token pruning cannot take over a sliding cache that is in use")
            new.update(old.keys, old.values)
            new.aligned = False  # the entries may include the host's padding
        cache.layers[index] = new
