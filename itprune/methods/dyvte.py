"""`dyvte`: all visual tokens of a sample leave the LLM at once, as soon as a router says so.

DyVTE (arXiv 2411.19628): once the text has absorbed the image, its tokens only cost. After every
layer a small trained router looks at the text alone, the mean of the tokens behind the image beside
the last one, and votes to stay or to exit. Positions stay as they were, and so does the KV cache of
the layers before the exit. `train/router.py` trains the routers as published.

Switches: the published routers are 2048 wide, one a layer (`hidden: 2048`); `shared` and `rank`
make them smaller. The published loop runs one sample at a time; here every sample of a batch exits
on its own (`batch: sample`), or all together once all agree (`batch: all`). The publication has no
budget: a `keep` moves the vote by a bias that a calibration finds.
Legend: N tokens alive, B samples, D LLM width.
"""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from itprune.calibration import Calibration
from itprune.host import Host
from itprune.methods import register_method
from itprune.methods.base import Card, Method, Trial
from itprune.methods.exits import Votes, exit_table
from itprune.options import check_choice, check_positive
from itprune.ragged import group_sizes
from itprune.tokens import Kept, LayerTokens

BATCH = ("sample", "all")
PUBLISHED_HIDDEN = 2048


@dataclass(frozen=True)
class DyvteOptions:
    """Options of `dyvte`."""

    hidden: int | None = None
    """Width of a router; null: 2048 as published, or the LLM's own width where that is less."""
    rank: int | None = None
    """Rank of a router's first matrix; null: full, as published."""
    shared: bool = False
    """One router for all layers instead of one each."""
    batch: str = "sample"
    """sample: each exits on its own; all: the batch exits at the first layer where all agree."""
    first: int = 0
    """0-based first layer after which an exit is possible."""
    last: int | None = None
    """Last such layer; null: the last but one of the model."""
    exit_layer: int | None = None
    """Exit every sample after this layer, without any router and whatever `keep` says."""

    def __post_init__(self) -> None:
        check_choice("prune.batch", self.batch, BATCH)
        for name, value in (("hidden", self.hidden), ("rank", self.rank)):
            check_positive(f"prune.{name}", value)


@dataclass
class Seen:
    """What the forwards under `exit_after` met at its layer; empty while no image came by."""

    features: Tensor | None = None
    """(B, 2 D) what the layer's router would look at, detached."""
    visual: Tensor | None = None
    """(B,) visual tokens of each sample before the exit."""


@dataclass
class _Forced:
    """An exit somebody else decided on."""

    layer: int | None
    seen: Seen = field(default_factory=Seen)


@register_method("dyvte")
class Dyvte(Method):
    """A learned exit of all visual tokens, its depth chosen for each sample."""

    Options = DyvteOptions
    card = Card(
        title="a trained router per LLM layer says when all visual tokens may leave",
        paper="2411.19628",
        count="dynamic",
        training="required",
        notes=(
            "Routers look at the first question only, so that later turns decide nothing. A keep "
            "is met by a calibrated bias on the votes; the publication has no budget. Each sample "
            "of a batch exits on its own (published: one sample at a time)."
        ),
    )
    places = ("layers",)

    def __init__(self, options: DyvteOptions, host: Host) -> None:
        super().__init__(options, host)
        self._range = _layer_range(options, host.depth)
        self._forced: _Forced | None = None
        self._votes: Votes | None = None
        count = 0 if options.exit_layer is not None else 1 if options.shared else host.depth - 1
        hidden = options.hidden or min(PUBLISHED_HIDDEN, host.width)
        self.routers = nn.ModuleList(
            _router(2 * host.width, hidden, options.rank) for _ in range(count)
        )
        # No language loss reaches a router, and a weight that waits for a gradient would block
        # several ranks: the router recipe unfreezes them.
        self.routers.requires_grad_(False)

    @property
    def idle(self) -> bool:
        return super().idle and self._forced is None and self._votes is None

    def share(self, keep: float | None) -> None:
        lowest = (self._range[0] + 1) / self.depth
        if keep is not None and keep < lowest and self.options.exit_layer is None:
            raise ValueError(
                f"prune.keep: {keep} is less than {lowest:.3f}, what an exit after layer "
                f"{self._range[0]} leaves; raise it or lower prune.first"
            )
        super().share(keep)

    def layers(self) -> tuple[int, ...]:
        if self._forced is None:
            return self._range
        return () if self._forced.layer is None else (self._forced.layer,)

    # ------------------------------------------------------------------------------- decision
    @torch.no_grad()
    def after_layer(self, tokens: LayerTokens) -> Kept:
        """Drops all visual tokens of the samples that exit here."""
        if self._forced is not None:
            leaves = self._force(tokens, self._forced)
        elif self.options.exit_layer is not None:
            leaves = torch.ones(tokens.samples, dtype=torch.bool, device=tokens.sample.device)
        else:
            leaves = self._vote(tokens)
        return Kept(~(tokens.visual & leaves[tokens.sample]))

    def _force(self, tokens: LayerTokens, forced: _Forced) -> Tensor:
        here = tokens.layer == forced.layer
        if here:
            forced.seen.features = router_features(tokens)
            forced.seen.visual = group_sizes(tokens.sample[tokens.visual], tokens.samples)
        return torch.full((tokens.samples,), here, device=tokens.sample.device)

    def _vote(self, tokens: LayerTokens) -> Tensor:
        """(B,) bool, who exits after this layer."""
        margin = self._margin(tokens)  # also when all have left: every rank runs the same modules
        visual = group_sizes(tokens.sample[tokens.visual], tokens.samples)
        if self.options.batch == "all":
            margin = margin.masked_fill(visual == 0, torch.inf).min().expand_as(margin)
        if self._votes is not None:
            self._votes.add(tokens.layer, margin, visual)
            return torch.zeros_like(visual, dtype=torch.bool)
        return margin + self._bias() > 0

    def _margin(self, tokens: LayerTokens) -> Tensor:
        """(B,) float32: logit to exit minus logit to stay."""
        router = self.routers[0 if self.options.shared else tokens.layer]
        weight = next(router.parameters())
        logits = router(router_features(tokens).to(weight.dtype)).float()
        return logits[:, 1] - logits[:, 0]

    # ------------------------------------------------------------------------------- budget
    def _bias(self) -> float:
        """What is added to every vote; 0 without a target: the published rule."""
        if self.keep is None or self.keep == 1.0:
            return 0.0
        found = self.calibration or Calibration()
        share, bias = found.numbers("share"), found.numbers("bias")
        if share is None or bias is None:
            warnings.warn(
                f"keep={self.keep} is set but the routers are not calibrated, so they alone "
                "decide; run `itprune calibrate` (training does it by itself)",
                stacklevel=2,
            )
            return 0.0
        return _nearest(share, bias, self.keep)

    def use(self, calibration: Calibration | None) -> None:
        if calibration is not None:
            share, bias = calibration.numbers("share"), calibration.numbers("bias")
            if len(share or ()) != len(bias or ()):
                raise ValueError("calibration: 'share' and 'bias' must be as many; make it anew")
        super().use(calibration)

    @property
    def calibrates(self) -> bool:
        return self.options.exit_layer is None

    @torch.no_grad()
    def calibrate(self, trial: Trial) -> Calibration:
        """Finds the bias for every target: `found` = {"share": [...], "bias": [...]}.

        Raises:
            ValueError: no sample has an image.
        """
        self._votes = Votes(first=self._range[0])
        try:
            trial.run()
            margin, weight = self._votes.table()
        finally:
            self._votes = None
        share, bias = exit_table(margin, weight, self._range[0], self.depth)
        return Calibration(samples=len(weight), found={"share": share, "bias": bias})

    # ------------------------------------------------------------------------------- training
    @contextmanager
    def exit_after(self, layer: int | None) -> Iterator[Seen]:
        """Inside, every sample exits after `layer` (None: never), whatever the routers say.

        Yields:
            What the layer's router would have looked at, filled by a forward with images.

        Raises:
            ValueError: no such layer.
        """
        if layer is not None and not 0 <= layer < self.depth - 1:
            raise ValueError(f"exit_after: layer {layer} is not in 0..{self.depth - 2}")
        before, self._forced = self._forced, _Forced(layer)
        try:
            yield self._forced.seen
        finally:
            self._forced = before

    def logits(self, features: Tensor, layer: int) -> Tensor:
        """Stay and exit logits of one layer's router, differentiable.

        All routers run: those that are not asked get gradients of zero, so every rank and every
        launcher sees the same set of trained weights in every step.

        Args:
            features: (B, 2 D) as `exit_after` recorded them.
            layer: whose router is asked.

        Returns:
            (B, 2) logits: stay, exit.
        """
        weight = next(self.routers.parameters())
        features = features.to(weight.dtype)
        everyone = torch.stack([router(features) for router in self.routers])
        return everyone[0 if self.options.shared else layer]

    @property
    def exits(self) -> tuple[int, ...]:
        """0-based layers after which an exit is possible."""
        return self._range


def router_features(tokens: LayerTokens) -> Tensor:
    """(B, 2 D) float32: mean of the question behind the image without its last token, beside that.

    A question of one token stands for both; answers are no part of `asks`.
    """
    hidden, sample = tokens.hidden.detach().float(), tokens.sample
    last = _mean(hidden, sample, tokens.last, tokens.samples)[0]
    mean, count = _mean(hidden, sample, tokens.asks & ~tokens.last, tokens.samples)
    return torch.cat([torch.where(count[:, None] > 0, mean, last), last], dim=1)


def _mean(hidden: Tensor, sample: Tensor, rows: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """(B, D) mean over the marked rows of each sample, zeros where none; (B,) how many."""
    weight = rows.to(hidden.dtype)
    count = weight.new_zeros(samples).index_add(0, sample, weight)
    total = hidden.new_zeros(samples, hidden.shape[1])
    total = total.index_add(0, sample, hidden * weight[:, None])
    return total / count.clamp(min=1)[:, None], count


def _router(width: int, hidden: int, rank: int | None) -> nn.Sequential:
    """Two matrices with a GELU between, the first one of low rank where asked; Xavier weights."""
    sizes = [(width, hidden)] if rank is None else [(width, rank), (rank, hidden)]
    into = [nn.Linear(a, b, bias=False) for a, b in sizes]
    router = nn.Sequential(*into, nn.GELU(), nn.Linear(hidden, 2, bias=False))
    for parameter in router.parameters():
        nn.init.xavier_uniform_(parameter)
    return router


def _layer_range(options: DyvteOptions, depth: int) -> tuple[int, ...]:
    """The layers after which an exit is possible, checked against the model."""
    if options.exit_layer is not None:
        first = last = options.exit_layer
        name = "prune.exit_layer"
    else:
        first, name = options.first, "prune.first and prune.last"
        last = depth - 2 if options.last is None else options.last
    if not 0 <= first <= last <= depth - 2:
        raise ValueError(
            f"{name}: {first} to {last} must ascend within 0..{depth - 2}, since the model has "
            f"{depth} LLM layers and a later one must be left to run faster"
        )
    return tuple(range(first, last + 1))


def _nearest(share: Sequence[float], bias: Sequence[float], keep: float) -> float:
    """The bias whose share of a descending table is the nearest to `keep`."""
    at = bisect.bisect_left(share, -keep, key=lambda s: -s)
    choices = [i for i in (at - 1, at) if 0 <= i < len(share)]
    return float(bias[min(choices, key=lambda i: abs(share[i] - keep))])
