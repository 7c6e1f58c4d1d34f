"""What a method's `sparsity` means for each layer of a forward.

`Savings` belongs to the engine and owns the hooks on feed-forward blocks. `Spared` belongs to one
forward: it says how each layer attends and which rows its feed-forward block runs narrower, and
both travel with the attention's call.
Legend: B samples, L physical columns, N tokens alive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from itprune.engine.attention import Split
from itprune.engine.cache import PrunedLayer
from itprune.engine.narrow import NarrowFeedForward
from itprune.engine.rows import Rows
from itprune.engine.scene import Raster, Scene, raster, same_image, within
from itprune.engine.sequence import Sequence
from itprune.engine.sparse import Masked, grouped_attention, masked_attention
from itprune.families.base import Family
from itprune.methods.base import Method
from itprune.tokens import Sparsity

Attend = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]
"""query, key, value, scale, dropout -> (B, L, H, d)."""


class Savings:
    """The hooks of a method that spares compute on visual tokens."""

    def __init__(self, family: Family, method: Method) -> None:
        self.family, self.method = family, method
        self.handles: list[RemovableHandle] = []
        self.works = "compute" in method.places
        self.narrows = self.works
        for layer in family.layers if self.works else ():
            block = family.feed_forward(layer)
            if block is None:
                self.narrows = False
            else:
                self.handles += NarrowFeedForward(family.attention(layer), block).handles

    def forward(self, sequence: Sequence, active: bool, starts: bool) -> Spared | None:
        """For one forward; None where the method spares nothing.

        Args:
            sequence: of the forward.
            active: there are images in it.
            starts: the mask is plainly causal and nothing is cached yet.
        """
        return Spared(self, sequence, active, starts) if self.works else None


@dataclass
class Spared:
    """What one forward spares. Rows are the tokens a layer runs on, None the host's (B, S)."""

    savings: Savings
    sequence: Sequence
    active: bool
    starts: bool
    memo: dict[Any, Any] = field(default_factory=dict)

    def gates(self, layer: int) -> bool:
        """Whether a layer has to know later on which of its cache entries are visual."""
        spare = self.savings.method.sparsity(layer)
        return spare is not None and (spare.heads is not None or spare.blind)

    def split(self, index: int, rows: Rows | None) -> Split | None:
        """Which rows layer `index` runs narrower.

        Raises:
            ValueError: a model whose feed-forward blocks cannot.
        """
        spare = self.savings.method.sparsity(index)
        if spare is None or spare.width == 1.0 or not self._any_visual(rows):
            return None
        if not self.savings.narrows:
            raise ValueError(
                "prune.ffn_keep: the feed-forward blocks of this language model cannot be "
                "narrowed; set it to 1.0"
            )

        def make() -> Split:
            visual, place = self.sequence.at("visual", self._alive(rows)), self._place(rows)
            return Split(place[~visual], place[visual], spare.width)

        return self._once(("split", id(rows), spare.width), make)

    def attention(
        self, index: int, rows: Rows | None, cached: PrunedLayer | None, mask: Callable[[], Tensor]
    ) -> Attend | None:
        """How layer `index` attends, where not as usual; its cache learns what is visual.

        Args:
            index: the layer.
            rows: what it runs on.
            cached: the layer's cache, where it is one that knows its entries.
            mask: () -> (B, 1, Lq, Lk) the mask this layer would have without savings.
        """
        spare = self.savings.method.sparsity(index)
        if spare is None:
            return None
        gated = spare.heads is not None or spare.blind
        if not self._any_visual(rows):
            hides = gated and cached is not None and cached.visual is not None
            return self._masked(spare, rows, cached, mask) if hides else None
        if cached is not None:
            cached.mark(self._table(self.sequence.visual, rows))
        if spare.window is None and not gated:
            return None
        if not self.starts:
            return self._masked(spare, rows, cached, mask)
        return self._grouped(spare, self._scene(rows, spare.window is not None))

    def _grouped(self, spare: Sparsity, scene: Scene) -> Attend:
        window = spare.window
        groups = scene.everything
        if window is not None:
            groups = self._once(("window", id(scene), window), lambda: scene.windowed(window))

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
            return grouped_attention(q, k, v, scene, spare, groups, scale, dropout)

        return attend

    # ------------------------------------------------------------------------ where things are
    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def _alive(self, rows: Rows | None) -> Rows:
        """The tokens alive, pads of the host's layout left out."""
        if rows is not None:
            return rows
        return self._once("alive", lambda: Rows.of(self.sequence.valid))

    def _any_visual(self, rows: Rows | None) -> bool:
        def make() -> bool:
            return bool(self.sequence.at("visual", self._alive(rows)).any())

        return self.active and self._once(("any", id(rows)), make)

    def _place(self, rows: Rows | None) -> Tensor:
        """(N,) physical index b * L + l of each token alive."""
        if rows is None:
            return self._alive(rows).token
        return torch.arange(len(rows.token), device=rows.token.device) if rows.packed else rows.slot

    def _raster(self) -> Raster:
        """(B, S)."""
        visual, family = self.sequence.visual, self.savings.family

        def make() -> Raster:
            slots, grid = family.slot_grids(int(visual.sum()))
            return raster(visual, slots.to(visual.device), grid.to(visual.device))

        return self._once("raster", make)

    def _scene(self, rows: Rows | None, windows: bool) -> Scene:
        def make() -> Scene:
            alive = self._alive(rows)
            return Scene(
                place=self._place(rows),
                sample=alive.sample,
                samples=alive.samples,
                visual=self.sequence.at("visual", alive),
                raster=self._raster().at(alive.token) if windows else None,
            )

        return self._once(("scene", id(rows), windows), make)

    def _table(self, facts: Tensor, rows: Rows | None) -> Tensor:
        """(B, S) -> (B, L) what holds of each entry a cache gets; False, or -1, at filling."""
        if rows is None:
            return facts
        off = False if facts.dtype == torch.bool else -1
        return torch.where(rows.filled, facts.gather(1, rows.table), off)

    # ------------------------------------------------------------------------ explicit masks
    def _masked(
        self,
        spare: Sparsity,
        rows: Rows | None,
        cached: PrunedLayer | None,
        mask: Callable[[], Tensor],
    ) -> Attend:
        shown, new = mask(), self._table(self.sequence.visual, rows)
        before = shown.shape[-1] - new.shape[1]
        past = None if cached is None else cached.visual
        if past is None:
            past = new.new_zeros(len(new), before)
        if spare.window is not None and self._any_visual(rows):
            shown = self._window(shown, spare.window, rows, before)
        masked = Masked(shown, new, torch.cat([past, new], 1))
        return functools.partial(_attend_masked, masked, spare)

    def _window(self, mask: Tensor, window: int, rows: Rows | None, before: int) -> Tensor:
        """Puts the images' windows into a mask; what is cached belongs to earlier images."""
        grids = self._raster()
        tables = [self._table(t, rows) for t in (grids.image, grids.row, grids.column)]
        query = Raster(*tables)
        key = Raster(*(F.pad(t, (before, 0), value=-1) for t in tables))
        inside = same_image(query, key)[:, None]
        near = within(query, key, window // 2)[:, None]
        if mask.dtype == torch.bool:
            return torch.where(inside, near, mask)
        hidden = torch.finfo(mask.dtype).min
        return torch.where(inside, torch.zeros_like(mask).masked_fill(~near, hidden), mask)


def _attend_masked(
    masked: Masked,
    spare: Sparsity,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    dropout: float,
) -> Tensor:
    return masked_attention(query, key, value, masked, spare, scale, dropout)
