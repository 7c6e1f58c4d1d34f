"""JoinedCache: one KV cache for rows that came at different times and hold different numbers of
tokens, in different numbers of them layer by layer.

Every row is written from column 0 on, so rows that come or leave move no other: the next entry of
a row goes to the row's own end, and what stands behind it is hidden by a mask. Layers whose rows
all hold equally many entries share that mask. Space grows in blocks, and is given back when rows
leave. The host model's forward asks for nothing of this: hooks hand its layers their masks.

Legend: B rows, R and C rows and columns there is space for, W columns in use, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from itprune.serving.prefilled import Place, Prefilled

BLOCK = 32
"""Columns are allocated in multiples of it."""
SLACK = 1.5
"""Space that is more than this many times what is needed is given back."""


def room(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns to make space for: a quarter more rows, so that few joins copy others."""
    return rows + rows // 4, -(-columns // BLOCK) * BLOCK


class Columns:
    """Where rows end, in layers where they hold equally many entries.

    Args:
        ends: (B,) column of each row's next entry.
        late: (B,) by how much its position ids lag behind the model's; None: nowhere.
        window: how far back the layers attend.
    """

    def __init__(
        self, ends: Sequence[int], late: Tensor | None, window: int | None, device: torch.device
    ) -> None:
        self.ends = torch.tensor(ends, device=device)
        self.slots = torch.arange(len(ends), device=device)
        self.narrowest, self.widest = min(ends), max(ends)
        self.late, self.window = late, window
        self.tables: tuple[Tensor, Tensor] | None = None
        """Rotary tables of this step, where ids lag."""
        self._seen: Tensor | None = None

    def seen(self, places: Tensor | None, now: Tensor) -> Tensor | None:
        """(B, W) bool, the entries a row attends to; None: all of them.

        Args:
            places: (R, C) where entries stand, in layers with a window.
            now: (B,) where the new tokens stand.
        """
        if places is None and self.narrowest == self.widest:
            return None
        if self._seen is None:
            column = torch.arange(self.widest + 1, device=self.ends.device)
            self._seen = column <= self.ends[:, None]
            if places is not None and self.window is not None:
                near = places[: len(now), : self.widest + 1] > now[:, None] - self.window
                self._seen &= near | (column == self.ends[:, None])
        return self._seen

    def advance(self) -> None:
        """Every row has one more entry."""
        self.ends += 1
        self.narrowest, self.widest = self.narrowest + 1, self.widest + 1
        self.tables = self._seen = None


class JoinedLayer(DynamicLayer):
    """Keys and values (R, H, C, d) of a layer; where entries stand (R, C), if it has a window."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.columns: Columns | None = None
        self.now: Tensor | None = None
        self._release()

    def _release(self) -> None:
        self.keys: Any = None
        self.values: Any = None
        self.places: Tensor | None = None
        self.is_initialized = False

    @property
    def space(self) -> tuple[int, int]:
        """R and C."""
        return (0, 0) if self.keys is None else (self.keys.shape[0], self.keys.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, unused ones included. Other threads may ask, also while these
        are given back."""
        return sum(held.nbytes for held in (self.keys, self.values) if held is not None)

    def fit(self, rows: int, columns: int, like: tuple[Tensor, Tensor] | None = None) -> None:
        """Makes space for so many rows and columns, and gives back what is far more, where there
        is memory for a smaller copy.

        Args:
            rows: at least 1, or 0 to give back everything.
            columns: the widest row's entries, with the one to come.
            like: keys and values of the kind to come.
        """
        if rows == 0:
            self._release()
            return
        want, (have_rows, have_columns) = room(rows, columns), self.space
        enough = have_rows >= rows and have_columns >= columns
        if enough and have_rows * have_columns <= SLACK * want[0] * want[1]:
            return
        try:
            self._resize(*want, *(like or (self.keys, self.values)))
        except torch.OutOfMemoryError:
            if not enough:
                raise

    def _resize(self, rows: int, columns: int, keys: Tensor, values: Tensor) -> None:
        """All of it or, where memory does not hold both sizes, nothing."""
        places = None
        if self.window is not None:
            flat = keys.new_zeros(1, 1, dtype=torch.int32)
            places = _resized(self.places, flat, rows, columns)
        new_keys = _resized(self.keys, keys, rows, columns)
        new_values = _resized(self.values, values, rows, columns)
        self.keys, self.values, self.places = new_keys, new_values, places
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def put(self, start: int, keys: Tensor, values: Tensor, places: Tensor) -> None:
        """Writes rows (n, H, L, d) from row `start` on; there is space."""
        rows, width = slice(start, start + len(keys)), keys.shape[2]
        self.keys[rows, :, :width], self.values[rows, :, :width] = keys, values
        if self.places is not None:
            self.places[rows, :width] = places.int()

    def move(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copies rows onto others. Takes no memory, so that it never fails."""
        for buffer in (self.keys, self.values, self.places):
            if buffer is not None:
                for old, new in zip(source, target, strict=True):
                    buffer[new] = buffer[old]

    def update(
        self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores one token a row, (B, H, 1, d); returns all columns in use. A forward that fails
        may be repeated: it overwrites what it wrote."""
        columns = self.columns
        assert columns is not None
        rows, width = len(key), columns.widest + 1
        self.keys[columns.slots, :, columns.ends] = key[:, :, 0]
        self.values[columns.slots, :, columns.ends] = value[:, :, 0]
        if self.places is not None and self.now is not None:
            self.places[columns.slots, columns.ends] = self.now.int()
        return self.keys[:rows, :, :width], self.values[:rows, :, :width]

    def seen(self) -> Tensor | None:
        """(B, W) bool, what the new tokens attend to; None: everything."""
        assert self.columns is not None
        assert self.now is not None
        return self.columns.seen(self.places, self.now)

    def get_seq_length(self) -> int:
        return 0 if self.columns is None else self.columns.widest

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


def _resized(old: Tensor | None, like: Tensor, rows: int, columns: int) -> Tensor:
    """(R, H, C, d) or (R, C) of another size, with as much of the old contents as fits; zeros
    elsewhere, since what a mask hides is multiplied by zero all the same."""
    shape = list(like.shape)
    axis = 2 if like.ndim == 4 else 1
    shape[0], shape[axis] = rows, columns
    new = like.new_zeros(shape)
    if old is not None:
        top, left = min(len(old), rows), min(old.shape[axis], columns)
        new[:top].narrow(axis, 0, left).copy_(old[:top].narrow(axis, 0, left))
    return new


class JoinedCache(Cache):
    """The cache of a running batch.

    Args:
        windows: how far back each layer attends; None: to everything.
        device: of the model.
    """

    def __init__(self, windows: Sequence[int | None], device: torch.device) -> None:
        self.own: list[JoinedLayer] = [JoinedLayer(window) for window in windows]
        super().__init__(layers=[*self.own])
        self.device = device
        self.rows: list[Place] = []
        self.position_ids: Tensor = torch.zeros(0, device=device)
        """(B, 1), or (4, B, 1) where positions have several axes: of the tokens to come."""
        self._groups: list[Columns] = []
        self._now = self.position_ids
        self._changed = True

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, unused ones included."""
        return sum(layer.nbytes for layer in self.own)

    @property
    def entries(self) -> int:
        """Tokens in the cache, summed over rows and layers."""
        depth = len(self.own)
        return sum(sum(place.counts) + depth * place.steps for place in self.rows)

    # ------------------------------------------------------------------------ rows come and go
    def join(self, prefilled: Prefilled, rows: Sequence[int]) -> None:
        """Takes over rows of a prefill, behind those there are."""
        new = [prefilled.rows[row] for row in rows]
        every, start = [*self.rows, *new], len(self.rows)
        for index, layer in enumerate(self.own):
            keys, values, places = prefilled.take(index, rows)
            width = max(place.length(index) for place in every) + 1
            layer.fit(len(every), width, (keys, values))
            layer.put(start, keys, values, places)
        self.rows, self._changed = every, True

    def leave(self, gone: Sequence[int]) -> list[int]:
        """Drops rows; the last ones take their places.

        Returns:
            Which of the old rows each row is now.
        """
        left = len(self.rows) - len(gone)
        holes = [row for row in gone if row < left]
        movers = [row for row in range(left, len(self.rows)) if row not in gone]
        order = list(range(left))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        self.rows, self._changed = [self.rows[row] for row in order], True
        for index, layer in enumerate(self.own):
            layer.move(movers, holes)
            layer.fit(left, max((place.length(index) for place in self.rows), default=0) + 1)
        return order

    # ------------------------------------------------------------------------ steps
    def ready(self) -> None:
        """Before a step: there is a column for it, and every layer knows where its rows end."""
        if self._changed:
            self._group()
            self._changed = False
        rows = len(self.rows)
        for layer in self.own:
            assert layer.columns is not None
            layer.fit(rows, layer.columns.widest + 1)

    def advance(self) -> None:
        """After a step."""
        for place in self.rows:
            place.steps += 1
        for group in self._groups:
            group.advance()
        self.position_ids += 1
        self._now += 1

    def _group(self) -> None:
        """Layers with equal ends share what is made of them."""
        rows, device = self.rows, self.device
        first = [place.late[0] for place in rows]
        ids = [[one + p.steps - p.late[0] for one in p.ids] for p in rows]
        self.position_ids = torch.tensor(ids, device=device).T[..., None]
        if len(self.position_ids) == 1:
            self.position_ids = self.position_ids[0]
        self._now = torch.tensor([p.prompt + p.steps for p in rows], device=device)
        found: dict[Any, Columns] = {}
        for index, layer in enumerate(self.own):
            ends = tuple(place.length(index) for place in rows)
            late = [place.late[index] - lag for place, lag in zip(rows, first, strict=True)]
            kinds = None if layer.window is None else tuple(place.kinds[index] for place in rows)
            key = (ends, tuple(late), layer.window, kinds)
            if key not in found:
                lag = torch.tensor(late, device=device) if any(late) else None
                found[key] = Columns(ends, lag, layer.window, device)
            layer.columns, layer.now = found[key], self._now
        self._groups = list(found.values())
