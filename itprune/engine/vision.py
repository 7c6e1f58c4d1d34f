"""Stage 1 in the vision path: score at the tower, choose before the projector.

Only kept features are projected. A dropped slot reaches the LLM as a row of exact zeros: the choice
travels inside the features themselves, through caches of encoder outputs, beam expansion and
`generate`, with no state beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from itprune.engine.attention import KEYWORD, AttentionCall
from itprune.families.base import Family
from itprune.methods.base import Method
from itprune.scores import attention_received, cls_attention, cls_attention_full_width, cls_cosine
from itprune.tokens import Images
from itprune.trace import Trace

TRACED_SCORE = "attention"
"""What a trace shows of a method that asks for no score."""


@dataclass
class VisionPass:
    """One run of the tower: what its hooks gather for the method."""

    family: Family
    pixels: Tensor
    protected: Tensor | None
    """(V,) visual tokens that must stay, where the caller's tokens are known already."""
    query: Tensor | None = None
    key: Tensor | None = None
    scale: float = 1.0
    hidden: Tensor | None = None
    kept: Tensor | None = None
    """(K,) flat index of the features that were projected; None: all."""
    shape: torch.Size = field(default_factory=torch.Size)
    scored: Tensor | None = None
    """(V,) the score the method asked for last."""
    trace: Trace | None = None
    open: bool = True

    # ------------------------------------------------------------------------ gathering
    def tap(self, query: Tensor, key: Tensor, scale: float) -> None:
        """Keeps the feature block's q and k; deaf to a recomputation after the pass."""
        if self.open:
            self.query, self.key, self.scale = query, key, scale

    def attention_kwargs(self) -> dict[str, Any]:
        return {KEYWORD: AttentionCall(tap=self.tap)}

    def block_output(self, output: Any) -> None:
        if self.open:
            self.hidden = (output[0] if isinstance(output, tuple) else output).detach()

    # ------------------------------------------------------------------------ choosing
    def shorten(self, features: Tensor, method: Method) -> Tensor:
        """(n, P, D) features -> the (1, K, D) that go through the projector."""
        self.open = False
        self.shape = features.shape[:2]
        images = self._images(features)
        kept = method.before_llm(images)
        keep = kept.keep if self.protected is None else kept.keep | self.protected
        if self.trace is not None:
            score = self._salience(TRACED_SCORE) if self.scored is None else self.scored
            self.trace.score, self.trace.lens = score, images.lens
            self.trace.keep = keep
        self.query = self.key = self.hidden = None
        if bool(keep.all()) and kept.features is None:
            return features
        self.kept = keep.nonzero()[:, 0]
        flat = images.features if kept.features is None else kept.features
        return flat[self.kept][None]

    def restore(self, projected: Tensor) -> Tensor:
        """(1, K, W) projected features -> (n, P, W) with zeros in dropped slots."""
        if self.kept is None:
            return projected
        flat = projected[0]
        out = flat.new_zeros(self.shape.numel(), flat.shape[-1])
        return out.index_copy(0, self.kept, flat).view(*self.shape, -1)

    def _images(self, features: Tensor) -> Images:
        count, patches = self.shape
        return Images(
            features=features.reshape(count * patches, -1),
            lens=torch.full((count,), patches, device=features.device),
            pixels=self.pixels,
            salience=self._salience,
        )

    def _salience(self, name: str) -> Tensor:
        """(V,) the named score; a CLS that is itself a visual token always stays."""
        assert self.query is not None
        assert self.key is not None
        hidden = self.hidden
        assert hidden is not None
        if not self.family.has_cls:
            return attention_received(self.query, self.key, self.scale).flatten()
        score = {
            "attention": lambda q, k: cls_attention(q, k, self.scale),
            "cosine": lambda q, k: cls_cosine(hidden),
            "full_width": cls_attention_full_width,
        }[name](self.query, self.key)
        if score.shape[1] == self.shape[1] - 1:
            # vision_feature_select_strategy "full": CLS is the first visual token.
            score = torch.cat([score.amax(1, keepdim=True), score], 1)
        self.scored = score.flatten()
        return self.scored


def pixels_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The pixel argument of a tower call."""
    return args[0] if args else kwargs["pixel_values"]
