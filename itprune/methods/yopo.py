"""`yopo`: all visual tokens stay for the first layers, and less is computed on them (2410.06169).

Until the cut, visual tokens of an image see each other in a window only, some heads do not treat
visual tokens, and visual tokens use the first part of the feed-forward channels; from the cut on
nobody attends to them. The published code multiplies by zero after the softmax, in which the visual
keys still take their share: `mode: zero_after_softmax` does the same, for checkpoints trained that
way. `mode: remove` drops for real, which is where time is saved, and renormalises by doing so.

Which heads treat visual tokens is calibrated: a head votes for itself where, from the position that
answers, its attention to visual keys over that to text keys exceeds a threshold; it is active with
votes from more than 40 % of the samples. Published are thresholds for four models; here the
threshold follows from the share of heads asked for.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from itprune.calibration import Calibration
from itprune.host import Host
from itprune.methods import register_method
from itprune.methods.base import Card, Method, Trial
from itprune.options import check_choice, check_fraction
from itprune.ragged import group_sizes
from itprune.tokens import Kept, LayerTokens, Sparsity, keep_every

MODES = ("remove", "zero_after_softmax")
WHOLE_LAYERS = 2
"""First layers that keep every head."""
VOTES = 0.4
"""A head is active with votes from more than this share of the samples."""


@dataclass(frozen=True)
class YopoOptions:
    """Published for LLaVA-1.5 at a quarter of the FLOPs: these values."""

    mode: str = "remove"
    """remove (fast), or zero_after_softmax (the published arithmetic, at full cost)."""
    window: int | None = 5
    """Odd width of the window visual tokens of an image see each other in; null: causal."""
    heads: float | None = 0.75
    """Share of heads that treat visual tokens, averaged over the layers before the cut; the first
    two layers keep all. Needs a calibration: without one, all heads treat them. null: all."""
    ffn_keep: float = 0.5
    """Share of the feed-forward channels visual tokens use, the first ones; 1.0: all."""
    cut: int | None = None
    """First layer where nobody attends to visual tokens; null: from `keep`, else half the depth."""

    def __post_init__(self) -> None:
        check_choice("prune.mode", self.mode, MODES)
        if self.window is not None and (self.window < 1 or self.window % 2 == 0):
            raise ValueError(f"prune.window: must be odd and positive, got {self.window}")
        check_fraction("prune.heads", self.heads)
        check_fraction("prune.ffn_keep", self.ffn_keep)


@register_method("yopo")
class Yopo(Method):
    """Less compute on visual tokens, then none."""

    Options = YopoOptions
    options: YopoOptions
    card = Card(
        "sparse compute on visual tokens until a cut layer",
        "2410.06169",
        count="schedule",
        training="calibration",
        needs=("grid",),
        notes="keep sets the cut layer (keep = cut / depth), since all visual tokens are alive "
        "before it; what window, heads and narrow feed-forward spare there comes on top and is in "
        "FLOPs, not in keep. In the mode zero_after_softmax visual tokens stay alive in all "
        "layers: window and feed-forward get cheaper, heads and the cut do not. That mode is the "
        "published arithmetic; remove renormalises. Published for LLaVA-1.5 with the LLM tuned "
        "under it, and with thresholds on the heads' ratios, which here follow from the share "
        "asked for.",
    )
    places = ("layers", "compute")

    def __init__(self, options: YopoOptions, host: Host) -> None:
        super().__init__(options, host)
        cut = options.cut
        if cut is not None and not 1 <= cut <= host.depth:
            raise ValueError(
                f"prune.cut: must be a layer from 1 to {host.depth} of this model, got {cut}"
            )
        self._ratios: dict[int, list[Tensor]] | None = None
        self._treated: tuple[int, list[Tensor]] | None = None
        """The cut, and the masks made for it."""
        self._warned = False

    # ------------------------------------------------------------------------ where
    def share(self, keep: float | None) -> None:
        """Sets the target average.

        Raises:
            ValueError: `keep` is less than one layer of visual tokens.
        """
        if self.options.cut is None and keep is not None and keep * self.depth < 0.5:
            raise ValueError(
                f"prune.keep: {keep} is less than one layer of visual tokens; the lowest "
                f"reachable value of this method on {self.depth} layers is {1 / self.depth:.3f}"
            )
        super().share(keep)

    @property
    def cut(self) -> int:
        """First layer where nobody attends to visual tokens."""
        if self.options.cut is not None:
            return self.options.cut
        if self.keep is None:
            return max(self.depth // 2, 1)
        return max(round(self.keep * self.depth), 1)

    @property
    def idle(self) -> bool:
        return self.keep == 1.0 and self._ratios is None

    def layers(self) -> tuple[int, ...]:
        if self._ratios is not None:
            return tuple(range(self.depth - 1))
        if self.options.mode != "remove" or self.cut == self.depth:
            return ()
        return (self.cut - 1,)

    def after_layer(self, tokens: LayerTokens) -> Kept:
        """Drops all visual tokens; while calibrating, records and drops nothing."""
        if self._ratios is None:
            return Kept(~tokens.visual)
        self._ratios[tokens.layer].append(_ratio(tokens))
        return keep_every(tokens)

    @property
    def windowed(self) -> bool:
        return self.options.window is not None

    @property
    def attends(self) -> bool:
        return self.windowed or self.options.heads is not None or self.cut < self.depth

    def sparsity(self, layer: int) -> Sparsity | None:
        if self._ratios is not None:
            return None
        return Sparsity(
            window=self.options.window,
            heads=self._heads(layer),
            width=self.options.ffn_keep,
            zero_after_softmax=self.options.mode == "zero_after_softmax",
            blind=layer >= self.cut,
        )

    # ------------------------------------------------------------------------ heads
    def use(self, calibration: Calibration | None) -> None:
        if calibration is not None and "heads" in calibration.found:
            self._check_heads(calibration.found["heads"])
        super().use(calibration)
        self._treated = None

    def _check_heads(self, rows: Any) -> None:
        listed = rows if isinstance(rows, list) and all(isinstance(r, list) for r in rows) else [[]]
        here = self.host.heads
        wrong = next((len(row) for row in listed if len(row) != here), None)
        if wrong is not None:
            raise ValueError(
                f"prune.heads: the calibration is for {wrong} heads, this model has {here}; "
                "calibrate on this model"
            )
        for row in listed:
            Calibration(found={"heads": row}).numbers("heads")

    def _heads(self, layer: int) -> Tensor | None:
        """(H,) bool of a layer, or None where all are active."""
        if self.options.heads is None or self.options.heads == 1.0 or layer < WHOLE_LAYERS:
            return None
        if self.calibration is None or "heads" not in self.calibration.found:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    "prune.heads: not calibrated, so all heads treat visual tokens; run "
                    "`itprune calibrate` or set prune.heads to null",
                    stacklevel=2,
                )
            return None
        if self._treated is None or self._treated[0] != self.cut:
            self._treated = (self.cut, self._masks(self.calibration))
        masks = self._treated[1]
        return masks[layer] if layer < len(masks) else None

    def _masks(self, calibration: Calibration) -> list[Tensor]:
        """One (H,) mask a recorded layer, with the share asked for on average before the cut."""
        assert self.options.heads is not None
        score = torch.tensor(calibration.found["heads"], dtype=torch.float64)  # (layers, H)
        layers = min(self.cut, len(score))
        free = score[WHOLE_LAYERS:layers].flatten()
        if len(free) == 0:
            return [torch.ones(self.host.heads, dtype=torch.bool)] * len(score)
        wanted = round(self.options.heads * self.host.heads * layers)
        count = min(max(wanted - self.host.heads * WHOLE_LAYERS, 0), len(free))
        # The threshold lies below the last head that fits.
        least = float(free.sort(descending=True).values[count - 1]) if count else float("inf")
        whole = torch.arange(len(score))[:, None] < WHOLE_LAYERS
        return list((score >= least) | whole)

    # ------------------------------------------------------------------------ calibration
    @property
    def calibrates(self) -> bool:
        return self.options.heads is not None

    @torch.no_grad()
    def calibrate(self, trial: Trial) -> Calibration:
        """Each head's ratio of attention to visual over text keys, at the vote that decides.

        Raises:
            ValueError: no calibration sample has an image.
        """
        self._ratios = {layer: [] for layer in range(self.depth - 1)}
        try:
            trial.run()
            ratios = [torch.cat(rows) for rows in self._ratios.values() if rows]
        finally:
            self._ratios = None
        samples = len(ratios[0]) if ratios else 0
        if samples == 0:
            raise ValueError("calibration: no sample has an image, so no head can be judged")
        # Active above a threshold in more than 40 % of samples: the value of rank 40 % decides.
        rank = int(VOTES * samples)
        score = [layer.sort(0, descending=True).values[rank] for layer in ratios]
        found = [[round(value, 8) for value in row.tolist()] for row in score]
        return Calibration(samples=samples, found={"heads": found})


def _ratio(tokens: LayerTokens) -> Tensor:
    """(samples with visual tokens, H) attention to visual over attention to text keys."""
    attention = tokens.heads(tokens.last, True)  # (H, N)
    table = attention.new_zeros(len(attention), tokens.samples)
    visual = table.index_add(1, tokens.sample, attention * tokens.visual)
    text = table.index_add(1, tokens.sample, attention * ~tokens.visual)
    has = group_sizes(tokens.sample[tokens.visual], tokens.samples) > 0
    return (visual / text.clamp(min=1e-12)).T[has].double().cpu()
