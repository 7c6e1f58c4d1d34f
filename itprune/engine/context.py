"""Context: everything one forward of the text model knows, in virtual positions.

It travels with the call as a keyword, layer after layer, so nothing survives the forward and a
layer recomputed under gradient checkpointing finds the very decision it took the first time.
Legend: B samples, S virtual length, N tokens alive, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from itprune.engine.attention import KEYWORD, AttentionCall
from itprune.engine.cache import PrunedLayer, adopt_layers
from itprune.engine.masks import causal_mask, gather_mask
from itprune.engine.relevance import Tapped, instruction_attention
from itprune.engine.rows import Rows
from itprune.methods.base import Method
from itprune.ragged import group_sizes
from itprune.report import Report, Segment
from itprune.tokens import LayerTokens
from itprune.trace import Trace

CONTEXT = "itprune_context"


@dataclass
class Sequence:
    """The host's sequence: one (B, S) mask per fact."""

    valid: Tensor
    """Not padding."""
    visual: Tensor
    protected: Tensor
    """Never dropped."""
    instruction: Tensor
    """Text of the first user turn."""
    asks: Tensor
    """Instruction rows whose attention decides at stage 2."""
    padding_mask: Tensor | None
    """(B, past + S) as the host got it; None: no padding."""

    def at(self, name: str, rows: Rows) -> Tensor:
        """(N,) one of the masks, for the tokens alive."""
        return {
            "visual": self.visual,
            "protected": self.protected,
            "instruction": self.instruction,
            "asks": self.asks,
        }[name].reshape(-1)[rows.token]


@dataclass
class Context:
    """One forward of the text model."""

    sequence: Sequence
    depth: int
    past: int
    """Virtual length of what the cache already holds."""
    plain: bool
    """The host's mask is causal plus padding, nothing else."""
    cache: Cache | None
    flash: bool
    """The host's attention takes 2-D padding masks."""
    method: Method | None
    """None: nothing is chosen in this forward (a decoding step on a pruned cache)."""
    first: Rows | None
    """What layer 0 runs on; None: the host's own layout."""
    packed: bool
    """Layout of rows made later."""
    rows_at: list[Rows | None] = field(default_factory=list)
    """What each layer ran on, filled as the layers run."""
    moves: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> index of the flat rows it takes from its predecessor's."""
    tapped: dict[int, Tapped] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)

    # ------------------------------------------------------------------------ layer by layer
    def before_layer(
        self, index: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]] | None:
        """The short tensors layer `index` runs on; None: leave the host's untouched."""
        if len(self.rows_at) == index:
            self._decide(index)
        rows = self.rows_at[index]
        if index in self.moves:
            assert rows is not None
            before = self.rows_at[index - 1] if index else None
            flat = hidden.reshape(-1, hidden.shape[-1]) if before is None else before.flat(hidden)
            hidden = rows.shape(flat[self.moves[index]])
        physical = self._physical(index, rows, kwargs)
        return None if physical is None else (hidden, physical)

    def after_last(self, hidden: Tensor) -> Tensor:
        """Back to (B, S, D) for the host's norm, head and loss."""
        rows = self.rows_at[-1]
        return hidden if rows is None else rows.scatter(hidden)

    def close(self, trace: Trace | None) -> Report | None:
        """Ends the forward; the report of what was kept."""
        self.tapped.clear()
        if self.method is None or len(self.rows_at) < self.depth:
            return None
        if trace is not None:
            self._fill(trace)
        return self._report()

    def _fill(self, trace: Trace) -> None:
        trace.visual = self.sequence.visual
        trace.alive = {}
        for index in (0, *self.moves):
            rows, alive = self.rows_at[index], self.sequence.valid
            if rows is not None:
                alive = torch.zeros_like(alive).reshape(-1).index_fill(0, rows.token, True)
            trace.alive[index] = alive.view_as(self.sequence.valid)

    # ------------------------------------------------------------------------ decisions
    def _decide(self, index: int) -> None:
        if index == 0:
            rows = self.first
            if rows is not None:
                self.moves[0] = rows.token
        else:
            rows = self.rows_at[index - 1]
            if index - 1 in self.tapped:
                rows = self._drop(index, rows)
        if rows is not None and index in self.moves and self.cache is not None:
            adopt_layers(self.cache, index, self.depth)
        self.rows_at.append(rows)

    def _drop(self, index: int, before: Rows | None) -> Rows | None:
        """Asks the method after layer `index - 1`; returns what layer `index` runs on."""
        assert self.method is not None
        alive = self._all_valid() if before is None else before
        tokens = self._layer_tokens(index - 1, alive, before is None)
        keep = self.method.after_layer(tokens) | self.sequence.at("protected", alive)
        if bool(keep.all()):
            return before
        kept = alive.select(keep)
        kept.packed = self.packed
        self.moves[index] = kept.token if before is None else keep.nonzero()[:, 0]
        return kept

    def _all_valid(self) -> Rows:
        samples, length = self.sequence.valid.shape
        token = self.sequence.valid.reshape(-1).nonzero()[:, 0]
        return Rows(token, samples, length, packed=False)

    def _layer_tokens(self, layer: int, rows: Rows, host_layout: bool) -> LayerTokens:
        seq, tapped = self.sequence, self.tapped.pop(layer)
        asks = seq.at("asks", rows)

        def relevance(rope: bool) -> Tensor:
            return instruction_attention(tapped, rows, host_layout, asks, rope)

        droppable = seq.instruction & ~seq.protected & seq.visual.any(1, keepdim=True)
        last_ask = torch.where(seq.asks, torch.arange(seq.asks.shape[1], device=asks.device), -1)
        scored = rows.position <= last_ask.amax(1)[rows.sample]

        return LayerTokens(
            layer=layer,
            sample=rows.sample,
            samples=rows.samples,
            visual=seq.at("visual", rows) & scored,
            droppable_text=droppable.reshape(-1)[rows.token] & scored,
            instruction_lens=droppable.sum(1),
            relevance=relevance,
        )

    # ------------------------------------------------------------------------ physical kwargs
    def _physical(
        self, index: int, rows: Rows | None, kwargs: dict[str, Any]
    ) -> dict[str, Any] | None:
        changes: dict[str, Any] = {}
        layer = self._cache_layer(index)
        if rows is not None:
            cos, sin = self._rotary(rows, kwargs["position_embeddings"])
            mask = self._mask(rows, layer, kwargs["attention_mask"])
            changes = {
                "position_embeddings": (cos, sin),
                "attention_mask": mask,
                "position_ids": None,
            }
            if layer is not None:
                layer.expect(rows, max(k for k in self.moves if k <= index))
        elif layer is not None:
            mask = self._mask(None, layer, kwargs["attention_mask"])
            changes = {"attention_mask": mask, "position_ids": None}
        packed = rows if rows is not None and rows.packed else None
        tap = self._tap(index, changes.get("position_embeddings", kwargs["position_embeddings"]))
        if packed is not None or tap is not None:
            changes[KEYWORD] = AttentionCall(packed, tap)
        return {**kwargs, **changes} if changes else None

    def _cache_layer(self, index: int) -> PrunedLayer | None:
        if self.cache is None or index >= len(self.cache.layers):
            return None
        layer = self.cache.layers[index]
        return layer if isinstance(layer, PrunedLayer) else None

    def _rotary(self, rows: Rows, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        key = ("rotary", id(rows), id(tables[0]))
        if key not in self.memo:
            self.memo[key] = (rows.gather(tables[0]), rows.gather(tables[1]))
        return self.memo[key]

    def _tap(self, index: int, tables: tuple[Tensor, Tensor]) -> Any:
        """Records q and k of a layer the method asked for, once."""
        undecided = len(self.rows_at) == index + 1
        if self.method is None or not undecided or index not in self.method.layers():
            return None

        def tap(query: Tensor, key: Tensor, scale: float) -> None:
            if len(self.rows_at) == index + 1 and index + 1 < self.depth:
                self.tapped[index] = Tapped(query, key, scale, *tables)

        return tap

    # ------------------------------------------------------------------------ masks
    def _mask(self, rows: Rows | None, layer: PrunedLayer | None, host: Any) -> Any:
        history = layer.history if layer is not None else ()
        key = ("mask", id(rows), history, id(host))
        if key not in self.memo:
            self.memo[key] = self._build_mask(rows, layer, host)
        return self.memo[key]

    def _build_mask(self, rows: Rows | None, layer: PrunedLayer | None, host: Any) -> Any:
        """The mask of the physical queries (None: the whole call) over cache entries and them."""
        stored = layer is not None and layer.position is not None
        if rows is not None and rows.packed:
            return None
        if self.plain and not stored and rows is not None:
            return None  # rows ascend and pads stand last: plain causal attention is exact
        samples, length = self.sequence.valid.shape
        if self.plain and stored and length == 1 and layer is not None and layer.aligned:
            return None
        if rows is None:
            query = torch.arange(length, device=self.sequence.valid.device).expand(samples, -1)
            new_filled = torch.ones_like(query, dtype=torch.bool)
        else:
            query, new_filled = rows.table, rows.filled
        key, filled = query + self.past, new_filled
        if layer is not None and layer.position is not None and layer.filled is not None:
            key = torch.cat([layer.position, key], 1)
            filled = torch.cat([layer.filled, filled], 1)
        if isinstance(host, Tensor) and host.ndim == 4 and not self.plain:
            offset = max(self.past + length - host.shape[-1], 0)
            return gather_mask(host, query, key - offset, filled)
        if self.sequence.padding_mask is not None:
            filled = filled & self.sequence.padding_mask.bool().gather(1, key)
        return filled if self.flash else causal_mask(query + self.past, key, filled)

    # ------------------------------------------------------------------------ report
    def _report(self) -> Report:
        seq = self.sequence
        report = Report(self.depth, seq.valid.sum(1), (seq.visual & seq.valid).sum(1))
        for index, rows in enumerate(self.rows_at):
            if index and index not in self.moves:
                continue
            tokens, visual = report.valid, report.visual
            if rows is not None:
                alive_visual = rows.sample[seq.at("visual", rows)]
                tokens, visual = rows.lens, group_sizes(alive_visual, rows.samples)
            report.segments.append(Segment(index, tokens, visual))
        return report
