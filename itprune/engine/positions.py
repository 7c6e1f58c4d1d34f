"""Position ids of kept tokens, and the rotary tables they ask for.

`original` ids are the host's: its tables are gathered. `contiguous` ids renumber what stays after a
drop, as several systems publish; then tables are computed anew, and tokens that follow, decoding
steps included, lag behind the host's ids by what was saved.
Legend: B samples, S virtual length, N tokens alive.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from itprune.engine.cache import PrunedLayer
from itprune.engine.rows import Rows
from itprune.engine.sequence import Sequence

Tables = tuple[Tensor, Tensor]


class Decoder(Protocol):
    """What a context asks of the model's decoder."""

    def rotary(self, hidden: Tensor, position_ids: Tensor, layer: int) -> Tables:
        """Tables (B, L, d) of a layer for position ids (B, L)."""

    def query_key(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Runs a layer's attention on hidden states for the sake of its tap."""


@dataclass
class Positions:
    """The position ids of one forward."""

    host: Decoder
    sequence: Sequence
    renumber: tuple[bool, bool]
    """Whether ids are renumbered after a drop before, and inside, the LLM."""
    memo: dict[Any, Tables] = field(default_factory=dict)

    def number(
        self,
        rows: Rows,
        before: Rows | None,
        keep: Tensor | None,
        kwargs: dict[str, Any],
        place: int,
    ) -> None:
        """Gives rows ids of their own, unless the host's still hold.

        Args:
            rows: what stays.
            before: what it was chosen from (None: the host's full rows).
            keep: (N,) mask over `before`.
            kwargs: of the decoder layer.
            place: 0 before the LLM, 1 inside.
        """
        if self.renumber[place]:
            ids = self._host_ids(kwargs["position_ids"])
            start = self.sequence.valid.int().argmax(1)
            base = ids.gather(1, start[:, None])[:, 0]
            first = rows.lens.cumsum(0) - rows.lens
            rank = torch.arange(len(rows.token), device=rows.token.device) - first[rows.sample]
            rows.ids = base[rows.sample] + rank
        elif before is not None and before.ids is not None and keep is not None:
            rows.ids = before.ids[keep]

    def tables(
        self,
        index: int,
        rows: Rows,
        layer: PrunedLayer | None,
        hidden: Tensor,
        kwargs: dict[str, Any],
    ) -> Tables:
        """The rows' tables in layer `index`: the host's, where its ids hold, else computed."""
        tables = kwargs["position_embeddings"]
        late = layer.late if layer is not None else None
        history = layer.history if layer is not None and late is not None else ()
        key = ("rows", id(rows), history, id(tables[0]))
        if key not in self.memo:
            if rows.ids is None and late is None:
                self.memo[key] = (rows.gather(tables[0]), rows.gather(tables[1]))
            else:
                self.memo[key] = self.host.rotary(hidden, self._ids(rows, late, kwargs), index)
        return self.memo[key]

    def _ids(self, rows: Rows, late: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        """(1, N) or (B, L) ids in the rows' layout."""
        ids = rows.ids
        if ids is None:
            ids = self._host_ids(kwargs["position_ids"]).reshape(-1)[rows.token]
        ids = ids if late is None else ids - late[rows.sample]
        return ids[None] if rows.packed else rows.pad(ids)

    def after_renumbered(
        self, index: int, layer: PrunedLayer, hidden: Tensor, kwargs: dict[str, Any]
    ) -> Tables:
        """Tables in layer `index` of tokens behind a prompt whose kept tokens were renumbered."""
        key = ("after", layer.history, id(kwargs["position_embeddings"][0]))
        if key not in self.memo:
            assert layer.late is not None
            ids = self._host_ids(kwargs["position_ids"]) - layer.late[:, None]
            self.memo[key] = self.host.rotary(hidden, ids, index)
        return self.memo[key]

    def late(self, rows: Rows, position_ids: Tensor) -> Tensor | None:
        """(B,) by how much the ids of what follows the rows lag behind the host's."""
        if rows.ids is None:
            return None
        ids = self._host_ids(position_ids).masked_fill(~self.sequence.valid, -1)
        own = torch.zeros_like(rows.lens).scatter_reduce(0, rows.sample, rows.ids, "amax")
        return ids.amax(1) - own

    def _host_ids(self, position_ids: Tensor | None) -> Tensor:
        """(B, S) ids as the host has them.

        Raises:
            ValueError: positions of several axes.
        """
        if position_ids is None or position_ids.ndim != 2:
            raise ValueError(
                "prune.positions: contiguous positions are defined for models with one position "
                "id a token; set prune.positions: original"
            )
        return position_ids.expand(self.sequence.valid.shape)
