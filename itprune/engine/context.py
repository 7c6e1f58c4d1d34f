"""Context: everything one forward of the text model knows, in virtual positions.

It travels with the call as a keyword, layer after layer, so nothing survives the forward and a
layer recomputed under gradient checkpointing finds the very decision it took the first time.
Legend: B samples, S virtual length, N tokens alive, D width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from itprune.engine.added import with_added
from itprune.engine.attention import KEYWORD, AttentionCall, Split
from itprune.engine.cache import PrunedLayer, adopt_layers
from itprune.engine.masks import causal_mask, filled_mask, gather_mask
from itprune.engine.positions import Decoder, Positions
from itprune.engine.relevance import LayerScores, Tapped
from itprune.engine.rows import Rows
from itprune.engine.sequence import Sequence
from itprune.engine.spare import Attend, Spared
from itprune.families.base import Added
from itprune.methods.base import Method
from itprune.ragged import group_sizes
from itprune.report import Report, Segment
from itprune.tokens import LayerTokens, Merge
from itprune.trace import Trace

CONTEXT = "itprune_context"


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
    host: Decoder
    positions: Positions
    spared: Spared | None
    """What the method spares on visual tokens that stay."""
    causal: bool = True
    """A host mask of None means causal attention; False: attention to everything."""
    added: Added | None = None
    """What the host's decoder adds to visual tokens between layers."""
    rows_at: list[Rows | None] = field(default_factory=list)
    """What each layer ran on, filled as the layers run."""
    moves: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> index of the flat rows it takes from its predecessor's."""
    merges: dict[int, Merge] = field(default_factory=dict)
    """Layer -> what merged tokens hold on the way into it, as indices of its flat input."""
    tapped: dict[int, Tapped] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)

    # ------------------------------------------------------------------------ layer by layer
    def before_layer(
        self, index: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]] | None:
        """The short tensors layer `index` runs on; None: leave the host's untouched."""
        before, hidden = hidden, self._complete(index - 1, hidden)
        if len(self.rows_at) == index:
            self._decide(index, hidden, kwargs)
        rows = self.rows_at[index]
        if index in self.moves:
            assert rows is not None
            hidden = rows.shape(self._flat(index, hidden)[self.moves[index]])
        physical = self._physical(index, rows, hidden, kwargs)
        if physical is None:
            return None if hidden is before else (hidden, kwargs)
        return hidden, physical

    def _complete(self, index: int, hidden: Tensor) -> Tensor:
        """The output of layer `index` with what the host adds behind it."""
        rows = self.rows_at[index] if index >= 0 else None
        return with_added(self.added, index, hidden, rows)

    def _flat(self, index: int, hidden: Tensor) -> Tensor:
        """(N, D) hidden states into layer `index`, on the tokens of the layer before; merged ones
        have their new contents. Without rows the host's full (B S, D)."""
        before = self.rows_at[index - 1] if index else None
        flat = hidden.reshape(-1, hidden.shape[-1]) if before is None else before.flat(hidden)
        merge = self.merges.get(index)
        if merge is None:
            return flat
        parts = flat[merge.source] * merge.weight[:, None].to(flat.dtype)
        fresh = torch.zeros_like(flat).index_add(0, merge.target, parts)
        changed = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        return torch.where(changed.index_fill(0, merge.target, True)[:, None], fresh, flat)

    def after_last(self, hidden: Tensor) -> Tensor:
        """Back to (B, S, D) for the host's norm, head and loss."""
        hidden, rows = self._complete(self.depth - 1, hidden), self.rows_at[-1]
        return hidden if rows is None else rows.scatter(hidden)

    def close(self, trace: Trace | None) -> Report | None:
        """Ends the forward; the report of what was kept."""
        self.tapped.clear()
        self.memo.pop("embedded", None)
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
    def _decide(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        rows = self.first if index == 0 else self.rows_at[index - 1]
        if index == 0:
            self.memo["embedded"] = hidden.detach().flatten(0, 1)
        if index == 0 and rows is not None:
            self.moves[0] = rows.token
            self.positions.number(rows, None, None, kwargs, 0)
        elif index and self.method is not None and index - 1 in self.method.layers():
            rows = self._drop(index, rows, hidden, kwargs)
        moved = rows is not None and index in self.moves
        if self.cache is not None and (moved or self._gates(index)):
            adopt_layers(self.cache, index, self.depth)
        self.rows_at.append(rows)

    def _drop(
        self, index: int, before: Rows | None, hidden: Tensor, kwargs: dict[str, Any]
    ) -> Rows | None:
        """Asks the method after layer `index - 1`; returns what layer `index` runs on."""
        assert self.method is not None
        alive = Rows.of(self.sequence.valid) if before is None else before
        if self.method.look_ahead:
            self._look_ahead(index, before, hidden, kwargs)
        if index - 1 not in self.tapped:
            return before
        # Detached first: a recomputed layer does not come by here, and must save as many tensors.
        flat = self._flat(index, hidden.detach())
        if before is None:
            flat = flat[alive.token]
        answer = self.method.after_layer(self._layer_tokens(index - 1, alive, before is None, flat))
        keep = answer.keep | self.sequence.at("protected", alive)
        if bool(keep.all()) and answer.merge is None:
            return before
        kept = alive.select(keep)
        kept.packed = self.packed
        self.positions.number(kept, alive, keep, kwargs, 1)
        self.moves[index] = kept.token if before is None else keep.nonzero()[:, 0]
        if answer.merge is not None:
            merge = answer.merge
            place = alive.token if before is None else torch.arange(len(keep), device=keep.device)
            self.merges[index] = Merge(place[merge.source], place[merge.target], merge.weight)
        return kept

    def _look_ahead(
        self, index: int, before: Rows | None, hidden: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Taps layer `index` on all tokens that reach it; draws no random numbers of the run."""
        tables = kwargs["position_embeddings"]
        if before is not None:
            tables = self.positions.tables(index, before, self._cache_layer(index), hidden, kwargs)
        cuda = [hidden.device] if hidden.is_cuda else []

        def tap(query: Tensor, key: Tensor, scale: float) -> None:
            self.tapped[index - 1] = Tapped(query, key, scale, *tables)

        call = AttentionCall(tap=tap, only_tap=True)
        with torch.no_grad(), torch.random.fork_rng(cuda):
            self.host.query_key(index, hidden, {"position_embeddings": tables, KEYWORD: call})

    def _layer_tokens(
        self, layer: int, rows: Rows, host_layout: bool, hidden: Tensor
    ) -> LayerTokens:
        seq = self.sequence
        scores = LayerScores(self.tapped.pop(layer), rows, host_layout)
        droppable = seq.instruction & ~seq.protected & seq.visual.any(1, keepdim=True)
        place = torch.arange(seq.asks.shape[1], device=rows.token.device)
        last_ask = torch.where(seq.asks, place, -1)
        end = last_ask.amax(1)  # behind it nothing is scored
        scored = rows.position <= end[rows.sample]
        return LayerTokens(
            layer=layer,
            sample=rows.sample,
            samples=rows.samples,
            position=rows.position,
            visual=seq.at("visual", rows) & scored,
            entered=self._entered(end),
            droppable_text=droppable.reshape(-1)[rows.token] & scored,
            instruction_lens=droppable.sum(1),
            asks=seq.at("asks", rows),
            last=seq.at("last", rows),
            hidden=hidden,
            embedded=lambda: self.memo["embedded"][rows.token],
            heads=scores.heads,
            logits=scores.logits,
        )

    def _entered(self, end: Tensor) -> Tensor:
        """(B,) visual tokens up to position `end` of each sample that layer 0 ran on."""
        rows = Rows.of(self.sequence.valid) if self.rows_at[0] is None else self.rows_at[0]
        counted = self.sequence.at("visual", rows) & (rows.position <= end[rows.sample])
        return group_sizes(rows.sample[counted], rows.samples)

    # ------------------------------------------------------------------------ physical kwargs
    def _physical(
        self, index: int, rows: Rows | None, hidden: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any] | None:
        changes: dict[str, Any] = {}
        layer = self._cache_layer(index)
        if rows is not None:
            mask = self._mask(rows, layer, kwargs["attention_mask"])
            changes = {
                "position_embeddings": self.positions.tables(index, rows, layer, hidden, kwargs),
                "attention_mask": mask,
                "position_ids": None,
            }
            if layer is not None:
                late = self.positions.late(rows, kwargs["position_ids"])
                layer.expect(rows, max(k for k in self.moves if k <= index), late)
        elif layer is not None:
            mask = self._mask(None, layer, kwargs["attention_mask"])
            changes = {"attention_mask": mask, "position_ids": None}
            if layer.late is not None:
                changes["position_embeddings"] = self.positions.after_renumbered(
                    index, layer, hidden, kwargs
                )
        packed = rows if rows is not None and rows.packed else None
        tap = self._tap(index, changes.get("position_embeddings", kwargs["position_embeddings"]))
        attend, split = self._spare(index, rows, layer, kwargs["attention_mask"])
        call = AttentionCall(packed, tap, attend=attend, split=split)
        if call != AttentionCall():
            changes[KEYWORD] = call
        return {**kwargs, **changes} if changes else None

    def _gates(self, index: int) -> bool:
        return self.method is not None and self.spared is not None and self.spared.gates(index)

    def _spare(
        self, index: int, rows: Rows | None, layer: PrunedLayer | None, host: Any
    ) -> tuple[Attend | None, Split | None]:
        if self.spared is None:
            return None, None
        mask = functools.partial(self._mask, rows, layer, host, explicit=True)
        attend = self.spared.attention(index, rows, layer, mask)
        return attend, self.spared.split(index, rows)

    def _cache_layer(self, index: int) -> PrunedLayer | None:
        if self.cache is None or index >= len(self.cache.layers):
            return None
        layer = self.cache.layers[index]
        return layer if isinstance(layer, PrunedLayer) else None

    def _tap(self, index: int, tables: tuple[Tensor, Tensor]) -> Any:
        """Records q and k of a layer the method asked for, once."""
        undecided = len(self.rows_at) == index + 1
        if self.method is None or not undecided or index not in self.method.layers():
            return None
        if self.method.look_ahead:
            return None

        def tap(query: Tensor, key: Tensor, scale: float) -> None:
            if len(self.rows_at) == index + 1 and index + 1 < self.depth:
                self.tapped[index] = Tapped(query, key, scale, *tables)

        return tap

    # ------------------------------------------------------------------------ masks
    def _mask(
        self, rows: Rows | None, layer: PrunedLayer | None, host: Any, explicit: bool = False
    ) -> Any:
        history = layer.history if layer is not None else ()
        key = ("mask", id(rows), history, id(host), explicit)
        if key not in self.memo:
            implied = not explicit and self._implied(rows, layer)
            self.memo[key] = None if implied else self._build_mask(rows, layer, host, explicit)
        return self.memo[key]

    def _implied(self, rows: Rows | None, layer: PrunedLayer | None) -> bool:
        """Whether plain causal attention is exact."""
        stored = layer is not None and layer.position is not None
        if rows is not None and rows.packed:
            return True
        if self.plain and not stored and rows is not None:
            return True  # rows ascend and pads stand last
        one = self.sequence.valid.shape[1] == 1
        return self.plain and stored and one and layer is not None and layer.aligned

    def _build_mask(
        self, rows: Rows | None, layer: PrunedLayer | None, host: Any, explicit: bool
    ) -> Any:
        """The mask of the physical queries (None: the whole call) over cache entries and them."""
        samples, length = self.sequence.valid.shape
        if rows is None:
            query = torch.arange(length, device=self.sequence.valid.device).expand(samples, -1)
            new_filled = torch.ones_like(query, dtype=torch.bool)
        else:
            query, new_filled = rows.table, rows.filled
        key, filled = query + self.past, new_filled
        if layer is not None and layer.position is not None and layer.filled is not None:
            key = torch.cat([layer.position, key], 1)
            filled = torch.cat([layer.filled, filled], 1)
        elif layer is None and self.past:  # a layer of the host's own cache holds everything
            past = torch.arange(self.past, device=key.device).expand(samples, -1)
            key = torch.cat([past, key], 1)
            filled = F.pad(filled, (self.past, 0), value=True)
        if isinstance(host, Tensor) and host.ndim == 4 and not self.plain:
            offset = max(self.past + length - host.shape[-1], 0)
            return gather_mask(host, query, key - offset, filled)
        if self.sequence.padding_mask is not None:
            filled = filled & self.sequence.padding_mask.bool().gather(1, key)
        if self.flash and not explicit:
            return filled
        if not self.causal:
            return filled_mask(query, filled)
        return causal_mask(query + self.past, key, filled)

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
