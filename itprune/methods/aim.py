"""`aim`: merge before the LLM, then drop layer by layer (after AIM, arXiv 2412.03248).

Before the LLM each image is merged down in bipartite rounds (`itprune/maths/bipartite.py`).
Inside, from layer l1 on, a random walk over the attention map scores the tokens and 1 / (l2 - l1)
more of the visual ones goes at each layer, until none is left after layer l2 - 1. What layer l
decides holds from layer l + 1 on; text stays.

The published habits that are switches here: means that forget earlier merges (`weighted`), output
in order of similarity (`order`), a walk without restarts, whose mass drifts to the front of the
sequence (`damping`). The published code masks dropped tokens instead of removing them, so they
still take part in the first step of the walk; ours walks over the tokens alive.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from itprune.maths.bipartite import ORDERS, Merging, bipartite_merging
from itprune.methods import register_method
from itprune.methods.base import Card, Host
from itprune.methods.fixed import fixed_count
from itprune.methods.layered import Layered
from itprune.options import check_choice, check_fraction
from itprune.tokens import Images, Kept, LayerTokens, fill, keep_all

METRICS = ("keys", "features")
PUBLISHED_MERGE = 252 / 576
"""What the released image code merges down to."""
ROUNDING = 1e-3
"""Lifts a product that float32 leaves just below a whole number of tokens."""
PUBLISHED_SPAN = (13 / 32, 21 / 32)
"""First and last layer of the fall in a 7B model, as a share of its depth."""


@dataclass(frozen=True)
class AimOptions:
    """Options of `aim`."""

    merge: float | None = None
    """Fraction of each image's tokens left after merging, 1: no merging; null: what prune.keep
    asks for, 0.4375 without one."""
    l1: int | None = None
    """0-based first layer after which visual tokens are dropped; null: 13 of 32. A layer behind the
    last: no dropping."""
    l2: int | None = None
    """The last visual tokens go after layer l2 - 1; null: 21 of 32."""
    metric: str = "keys"
    """Similarity of keys (the encoder's last block, all heads) or features, for merging."""
    order: str = "published"
    """Merged tokens as published (the unmerged by falling similarity first) or in raster order."""
    weighted: bool = False
    """A merged token's mean weighs its members by the tokens already merged into them."""
    temperature: float = 0.1
    """Softmax temperature of the walk."""
    steps: int = 5
    """Steps of the walk."""
    damping: float = 0.0
    """Share of the walk that starts anew, anywhere, at each step."""

    def __post_init__(self) -> None:
        check_fraction("prune.merge", self.merge)
        check_choice("prune.metric", self.metric, METRICS)
        check_choice("prune.order", self.order, ORDERS)
        if self.temperature <= 0 or self.steps < 1 or not 0 <= self.damping < 1:
            raise ValueError(
                "prune: the walk needs temperature > 0, steps >= 1 and damping in [0, 1), got "
                f"{self.temperature}, {self.steps} and {self.damping}"
            )


@register_method("aim")
class Aim(Layered):
    """Bipartite merging before the LLM, a linear fall inside it."""

    Options = AimOptions
    card = Card(
        "bipartite merging, then a linear fall by PageRank over attention",
        paper="2412.03248",
        count="schedule",
        notes="Published code masks dropped tokens, and their rows still enter the first step of "
        "the walk; ours removes them and walks over the tokens alive, up to the question's end, so "
        "that answers decide nothing; scores differ slightly. "
        "Merging is that of the image code, before the projector (published for video: behind it). "
        "A keep sets how far is merged.",
    )
    needs_patches = True
    places: tuple[str, ...] = ("before_llm", "layers")  # type: ignore[assignment, unused-ignore]

    def __init__(self, options: AimOptions, host: Host) -> None:
        super().__init__(options, host)
        self.l1, self.l2 = _span(options, host.depth)
        self._layers = range(self.l1, min(self.l2, host.depth - 1))
        self.needs_patches = options.merge != 1.0 and options.metric != "features"
        acts = {"before_llm": options.merge != 1.0, "layers": bool(self._layers)}
        self.places = tuple(place for place in acts if acts[place])
        self._average = sum(self._fall(layer - 1) for layer in range(host.depth)) / host.depth

    def positions_at(self, place: str) -> str:
        """Merged tokens are numbered afresh; those the LLM drops leave a gap."""
        return "contiguous" if place == "before_llm" else "original"

    # ------------------------------------------------------------------------ the dial
    def _fall(self, layer: int) -> float:
        """Published share of the tokens entering the LLM that go on after a layer."""
        return min(1.0, max(0.0, 1 - (layer - self.l1 + 1) / (self.l2 - self.l1)))

    def _split(self) -> tuple[float, float]:
        """Fraction left by merging, and how far of its published way the fall inside goes.

        Merging gives way first: a target that no merging would still miss flattens the fall.

        Raises:
            ValueError: a target out of reach of the options.
        """
        merge, average = self.options.merge, self._average
        if self.keep == 1.0:
            return 1.0, 0.0
        if self.keep is None:
            return (PUBLISHED_MERGE if merge is None else merge), 1.0
        if merge is None and self.keep <= average:
            return self.keep / average, 1.0
        left = 1.0 if merge is None else merge
        if not left * average - 1e-9 <= self.keep <= left + 1e-9:
            raise ValueError(
                f"prune.keep: {self.keep} is out of reach, since with merge={left} and the fall "
                f"from layer {self.l1} to {self.l2} of {self.depth} the average lies in "
                f"{left * average:.3f}..{left:.3f}; change prune.merge, or prune.l1 and prune.l2"
            )
        return left, (1 - self.keep / left) / (1 - average) if average < 1 else 1.0

    def plan(self) -> dict[int, float]:
        way = self._split()[1]
        return {layer: 1 - way * (1 - self._fall(layer)) for layer in self._layers}

    # ------------------------------------------------------------------------ before the LLM
    def vision_blocks(self) -> tuple[int, ...]:
        last = self.host.vision_blocks - 1
        return (last,) if self.options.metric == "keys" and "before_llm" in self.places else ()

    def before_llm(self, images: Images) -> Kept:
        merge = self._split()[0]
        if merge == 1.0:
            return keep_all(images)
        merging = self._merging(images, fixed_count(merge, images.lens))
        return fill(images, merging.keep, merging.apply(images.features))

    @torch.no_grad()
    def _merging(self, images: Images, count: Tensor) -> Merging:
        options = self.options
        metric = images.features if options.metric == "features" else self._keys(images)
        return bipartite_merging(
            metric, images.lens, count, order=options.order, weighted=options.weighted
        )

    def _keys(self, images: Images) -> Tensor:
        """(V, H d) keys of the encoder's last block, heads side by side."""
        key = images.block(self.host.vision_blocks - 1).key.transpose(1, 2).flatten(2)
        key = key[:, 1:] if images.has_cls else key
        if key.shape[0] * key.shape[1] != len(images.features):
            raise ValueError(
                "prune.metric: keys needs one key for each visual token, but the encoder has "
                f"{key.shape[0] * key.shape[1]} for {len(images.features)}; use metric: features"
            )
        return key.flatten(0, 1)

    # ------------------------------------------------------------------------ inside the LLM
    def score(self, tokens: LayerTokens) -> Tensor:
        table, filled = tokens.logits()
        options = self.options
        asked = filled.clone()
        asked[filled] = _asked(tokens)
        score = importance(table, asked, options.temperature, options.steps, options.damping)
        return score[filled]

    def count(self, tokens: LayerTokens) -> Tensor:
        """(B,) how many visual tokens of each sample go on: the plan's share, rounded down."""
        share = self.plan()[tokens.layer]
        return (tokens.entered * share + ROUNDING).floor().long()


def _asked(tokens: LayerTokens) -> Tensor:
    """(N,) bool: tokens up to the question's last. A walk that starts at an answer, or at what an
    assistant guesses, would let it choose what it is to be told by."""
    end = torch.full((tokens.samples,), -1, device=tokens.position.device)
    asks = tokens.asks
    end = end.scatter_reduce(0, tokens.sample[asks], tokens.position[asks], "amax")
    return tokens.position <= end[tokens.sample]


def _span(options: AimOptions, depth: int) -> tuple[int, int]:
    """Both ends of the fall, the open ones scaled to the depth."""
    l1, l2 = options.l1, options.l2
    if l1 is None:
        l1 = round(PUBLISHED_SPAN[0] * depth)
        l1 = l1 if l2 is None else min(l1, l2 - 1)
    if l2 is None:
        l2 = max(l1 + 1, round(PUBLISHED_SPAN[1] * depth))
    if not 0 <= l1 < l2:
        raise ValueError(f"prune.l1, prune.l2: must be layers with 0 <= l1 < l2, got {l1} and {l2}")
    return l1, l2


@torch.no_grad()
def importance(
    logits: Tensor, filled: Tensor, temperature: float, steps: int, damping: float
) -> Tensor:
    """PageRank over attention: where a walk that starts anywhere is after some steps.

    Args:
        logits: (B, H, L, L) float causal attention logits, -inf where unseen.
        filled: (B, L) True where a token stands.
        temperature: of the softmax that turns logits into the walk's transitions.
        steps: of the walk.
        damping: share of the walk that starts anew at each step.

    Returns:
        (B, L) float32 root of the mean over heads of the squared mass; 0 at pads. Costs a softmax
        and `steps` products of a vector and an L x L matrix for each head, 2 steps B H L²
        operations, and for a moment three times the memory of the logits.
    """
    scaled = logits.float() / temperature
    # A pad's row is nothing but -inf and would become no number. One finite entry mends that; what
    # it is does not matter, since no mass ever comes to a pad.
    scaled[..., 0].masked_fill_(~filled[:, None], 0.0)
    move = torch.softmax(scaled, -1)
    start = filled / filled.sum(1, keepdim=True).clamp(min=1)
    start = start[:, None, None].expand(-1, logits.shape[1], 1, -1)
    mass = start
    for _ in range(steps):
        mass = (1 - damping) * (mass @ move) + damping * start
    return mass[:, :, 0].square().mean(1).sqrt()
