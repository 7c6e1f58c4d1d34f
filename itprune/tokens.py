"""What a method sees and what it answers: plain tensors, no model.

Before the LLM a method is handed the `Images` of a forward, after an LLM layer the `LayerTokens`;
it answers both with a `Kept`. Methods and families meet here, and nowhere else. What costs
something to compute is a callable, so that a method pays only for what it asks.
Legend: n images, V their visual tokens, D vision width, W LLM width, H heads, T encoder tokens
(CLS first where there is one), N tokens alive of all samples, B samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from itprune.ragged import group_ids
from itprune.scores import attention_received, cls_attention, cls_attention_full_width, cls_cosine

SCORES = ("attention", "cosine", "full_width")
"""Names `Images.salience` knows."""


@dataclass(frozen=True)
class Block:
    """One block of the vision encoder, for all images."""

    query: Tensor
    """(n, H, T, d)."""
    key: Tensor
    """(n, H, T, d)."""
    scale: float
    """Softmax scale."""
    hidden: Tensor
    """(n, T, D) the block's output."""
    mask: Tensor | None = None
    """(n, 1, T, T) bool, what may be seen; None: everything."""

    def score(self, name: str, has_cls: bool) -> Tensor:
        """(n, P) float32: one of `SCORES`; without CLS the mean attention received."""
        if not has_cls:
            return attention_received(self.query, self.key, self.scale, self.mask)
        if name == "attention":
            return cls_attention(self.query, self.key, self.scale)
        if name == "cosine":
            return cls_cosine(self.hidden)
        return cls_attention_full_width(self.query, self.key)


@dataclass(frozen=True)
class Images:
    """The visual tokens of one forward, before the projector."""

    features: Tensor
    """(V, D) vision features, raster order, image after image."""
    lens: Tensor
    """(n,) visual tokens of each image."""
    pixels: Tensor
    """(R, …) what the encoder saw."""
    slots: Tensor
    """(n,) positions each image has in the LLM's input; `lens` unless its pixels were shrunk."""
    grid: Tensor
    """(n, 2) rows and columns of each image's patches."""
    slot_grid: Tensor
    """(n, 2) `grid`, before the pixels were shrunk."""
    sample: Tensor
    """(n,) row of the batch each image belongs to; zeros while the rows are not known."""
    feature_block: int
    """0-based encoder block whose output the features are."""
    has_cls: bool
    block: Callable[[int], Block]
    """Any block named by `Method.vision_blocks`."""
    projected: Callable[[], Tensor]
    """() -> (V, W) all features through the model's projector."""
    question: Callable[[], Tensor]
    """() -> (n, W) state of the last token of each image's question, the LLM run on the question
    alone; zeros where there is none. Only for methods with `needs_question`."""
    instruction: Callable[[], tuple[Tensor, Tensor]]
    """() -> (M, W) input embeddings of the question tokens of every image, (M,) whose image."""
    extra: Tensor | None = None
    """(n, S, D) what became of `Method.tower_tokens`."""
    source: Tensor | None = None
    """(R,) image of each row of `pixels`, ascending; None: row i is image i."""
    scored: Callable[[str, int], Tensor] | None = None
    """(score, block) -> (V,), where tokens are not the encoder's patches one by one and `block` is
    out of reach; None: they are."""

    @property
    def image(self) -> Tensor:
        """(V,) which image each token belongs to."""
        return group_ids(self.lens)

    @property
    def fingerprint(self) -> Tensor:
        """(n,) int64, exact whatever the batch is: lets a seeded choice depend on the image."""
        values = (self.pixels.detach().float() * 64).round().long().flatten(1)
        place = torch.arange(1, values.shape[1] + 1, device=values.device)
        rows = (values * place).sum(1)
        if self.source is not None:
            start = torch.searchsorted(self.source, self.source)
            turn = torch.arange(1, len(rows) + 1, device=rows.device) - start
            rows = rows.new_zeros(len(self.lens)).index_add(0, self.source, rows * turn)
        return rows.abs()

    def salience(self, name: str = "attention") -> Tensor:
        """(V,) float32, higher = keep: one of `SCORES` at the feature block.

        An encoder without CLS is scored by the mean attention each token receives.
        """
        return self.token_score(name, self.feature_block)

    def token_score(self, name: str, index: int) -> Tensor:
        """(V,) float32: one of `SCORES` at block `index`, patches pooled where several make one
        token."""
        if self.scored is not None:
            return self.scored(name, index)
        score = self.patch_score(name, index)
        return (self.with_cls(score) if self.has_cls else score).flatten()

    def patch_score(self, name: str, index: int) -> Tensor:
        """(n, P) float32: one of `SCORES` for the patches, at block `index`."""
        return self.block(index).score(name, self.has_cls)

    def with_cls(self, score: Tensor) -> Tensor:
        """(n, P) patch scores -> (n, V / n); a CLS that is itself a visual token always stays."""
        if score.numel() == len(self.features):
            return score
        return torch.cat([score.amax(1, keepdim=True), score], 1)


@dataclass(frozen=True)
class Merge:
    """New contents of kept tokens as weighted sums of tokens alive; constants to autograd."""

    source: Tensor
    """(M,) token alive."""
    target: Tensor
    """(M,) kept token, as an index of the tokens alive; what it held counts only if listed."""
    weight: Tensor
    """(M,) float."""


@dataclass(frozen=True)
class Kept:
    """A method's answer: which tokens stay, and what they hold."""

    keep: Tensor
    """(slots of all images,) bool before the LLM; (N,) bool after a layer."""
    features: Tensor | None = None
    """Before the LLM: (slots of all images, D), read where `keep`; None: unchanged."""
    merge: Merge | None = None
    """After a layer: what changes; None: nothing."""


@dataclass(frozen=True)
class LayerTokens:
    """The tokens alive after one LLM layer."""

    layer: int
    sample: Tensor
    """(N,) ascending sample ids."""
    samples: int
    """B."""
    position: Tensor
    """(N,) position within the full row."""
    visual: Tensor
    """(N,) bool: visual tokens that some instruction token can see."""
    entered: Tensor
    """(B,) how many such tokens entered the LLM."""
    droppable_text: Tensor
    """(N,) bool: instruction text that may be dropped (not special, template or supervised)."""
    instruction_lens: Tensor
    """(B,) droppable text tokens in each sample's instruction before any drop."""
    asks: Tensor
    """(N,) bool: instruction tokens behind the first visual token."""
    last: Tensor
    """(N,) bool: the last instruction token of each sample; the prompt's last in `generate`."""
    hidden: Tensor
    """(N, W) hidden states after the layer."""
    embedded: Callable[[], Tensor]
    """() -> (N, W) what these tokens were when they entered the LLM."""
    heads: Callable[[Tensor, bool], Tensor]
    """(rows (N,) bool, rope) -> (H, N) float32: attention these rows pay to each token, averaged
    over the rows that can see it; 0 where none can."""
    logits: Callable[[], tuple[Tensor, Tensor]]
    """() -> (B, H, L, L) float32 scaled causal logits, -inf where unseen, and (B, L) bool: where
    the tokens stand; their flattened order is that of the tokens alive."""

    def attention(self, rows: Tensor, rope: bool = True) -> Tensor:
        """(N,) float32: `heads`, averaged over the heads."""
        return self.heads(rows, rope).mean(0)

    def relevance(self, rope: bool) -> Tensor:
        """(N,) float32: attention the instruction pays to each token."""
        return self.attention(self.asks, rope)


@dataclass(frozen=True)
class Sparsity:
    """Compute an LLM layer spares on visual tokens that stay."""

    window: int | None = None
    """Visual tokens of an image see each other in a window of this odd width only."""
    heads: Tensor | None = None
    """(H,) bool: heads that treat visual tokens; None: all."""
    width: float = 1.0
    """Share of the feed-forward channels that visual tokens use, the first ones."""
    zero_after_softmax: bool = False
    """True: the published arithmetic, which multiplies by zero after the softmax."""
    blind: bool = False
    """No token attends to a visual one."""


def keep_all(images: Images) -> Kept:
    """The neutral answer before the LLM."""
    slots = int(images.slots.sum())
    return Kept(torch.ones(slots, dtype=torch.bool, device=images.features.device))


def keep_every(tokens: LayerTokens) -> Kept:
    """The neutral answer after a layer."""
    return Kept(torch.ones_like(tokens.visual))


def spread(slots: Tensor, count: Tensor) -> Tensor:
    """Evenly spaced slots: slot i stays where the running count floor((i + 1) k / n) steps up.

    Args:
        slots: (n,) slots of each image.
        count: (n,) how many of them.

    Returns:
        (slots of all images,) bool.
    """
    image = group_ids(slots)
    total, wanted = slots[image], count[image]
    place = torch.arange(len(image), device=slots.device) - (slots.cumsum(0) - slots)[image]
    return (place + 1) * wanted // total > place * wanted // total


def fill(images: Images, keep: Tensor, rows: Tensor) -> Kept:
    """Puts row j of (K, D) new features into the j-th kept slot."""
    empty = rows.new_zeros(len(keep), rows.shape[1])
    return Kept(keep, empty.index_copy_(0, keep.nonzero()[:, 0], rows))
