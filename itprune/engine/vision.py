"""The vision path: what a method acts on before the LLM.

Only kept features are projected. A dropped slot reaches the LLM as a row of exact zeros: the choice
travels inside the features themselves, through caches of encoder outputs, beam expansion and
`generate`, with no state beside them.
Legend: n images, P features and S slots of each, D vision width, W LLM width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from itprune.engine.attention import KEYWORD, AttentionCall
from itprune.engine.question import Question, expanded
from itprune.families.base import Family
from itprune.methods.base import Method
from itprune.tokens import Block, Images
from itprune.trace import Trace

VISION_PLACES = {"pixels", "tower", "before_llm"}
Projector = Callable[[Tensor], Tensor]


@dataclass
class VisionPass:
    """One run of the tower: what its hooks gather for the method."""

    family: Family
    method: Method
    pixels: Tensor
    """(n, …) as the caller gave them."""
    question: Question | None
    """None: the caller's tokens are not known yet."""
    trace: Trace | None = None
    shown: Tensor | None = None
    """(n, …) what the tower sees, where the method shrinks the image."""
    tokens: Tensor | None = None
    """(S, D) injected into the tower."""
    blocks: dict[int, Block] = field(default_factory=dict)
    tapped: dict[int, tuple[Tensor, Tensor, float]] = field(default_factory=dict)
    kept: Tensor | None = None
    """(K,) flat slot of the features that were projected; None: all."""
    slots: torch.Size = field(default_factory=torch.Size)
    """n and the slots of each image."""
    waiting: Tensor | None = None
    """(n, P + extra, D) features of a pass that has to wait for the question."""
    encoded: Tensor | None = None
    """(n, P, W) what a pass that waits has made of them meanwhile."""
    open: bool = True

    # ------------------------------------------------------------------------ tower
    def tower_kwargs(self) -> dict[str, Any]:
        """What changes in the tower's call: shrunk pixels, injected tokens."""
        changes: dict[str, Any] = {}
        before = self.family.grid(self.pixels)
        after = self.method.grid(*before)
        if after != before:
            changes = self.family.resize(self.pixels, after)
            self.shown = changes["pixel_values"]
        self.tokens = self.method.tower_tokens()
        if self.tokens is not None:  # travels with the call, so recomputed blocks see it, too
            changes[KEYWORD] = AttentionCall(isolated=len(self.tokens))
        return changes

    def inject(self, embedded: Tensor) -> Tensor:
        """(n, T, D) -> (n, T + S, D)."""
        if self.tokens is None:
            return embedded
        tokens = self.tokens.to(embedded.dtype).expand(len(embedded), -1, -1)
        return torch.cat([embedded, tokens], 1)

    def wants(self, block: int) -> bool:
        return self.open and (
            block in self.method.vision_blocks()
            or (self.trace is not None and block == self.family.feature_block)
        )

    def attention_kwargs(self, block: int) -> dict[str, Any]:
        """Asks one block's attention for its q and k."""

        def tap(query: Tensor, key: Tensor, scale: float) -> None:
            if self.open:  # deaf to a recomputation after the pass
                self.tapped[block] = (query, key, scale)

        isolated = 0 if self.tokens is None else len(self.tokens)
        return {KEYWORD: AttentionCall(tap=tap, isolated=isolated)}

    def block_output(self, block: int, output: Any) -> None:
        hidden = (output[0] if isinstance(output, tuple) else output).detach()
        query, key, scale = self.tapped.pop(block)
        own = hidden.shape[1] - (0 if self.tokens is None else len(self.tokens))
        self.blocks[block] = Block(query[:, :, :own], key[:, :, :own], scale, hidden[:, :own])

    # ------------------------------------------------------------------------ projector
    def shorten(self, features: Tensor, project: Projector) -> Tensor:
        """(n, P + extra, D) features -> the (1, K, D) that go through the projector."""
        self.open = False
        if self.question is None and self.method.needs_question:
            self.waiting = features
            return features if self.tokens is None else features[:, : -len(self.tokens)]
        images = self._images(features, project)
        self.slots = torch.Size((len(images.lens), int(images.slots[0])))
        kept = self.method(images)
        keep = kept.keep if self.question is None else kept.keep | self._protected(len(kept.keep))
        self._note(images, keep)
        self.blocks = {}
        same = bool(keep.all()) and kept.features is None
        if same and self.tokens is None and self.shown is None:
            return features
        self.kept = keep.nonzero()[:, 0]
        flat = images.features if kept.features is None else kept.features
        beside = keep & ~kept.keep
        if kept.features is not None and bool(beside.any()):
            # A protected slot the method left empty holds what was there, where that is known.
            if len(images.features) != len(beside):
                raise ValueError(
                    "an answer follows an image directly; put some text between them, or choose a "
                    "method that does not shrink the image"
                )
            flat = torch.where(beside[:, None], images.features, flat)
        return flat[self.kept][None]

    def restore(self, projected: Tensor) -> Tensor:
        """(1, K, W) projected features -> (n, S, W) with zeros in dropped slots."""
        if self.kept is None:
            return projected
        flat = projected[0]
        out = flat.new_zeros(self.slots.numel(), flat.shape[-1])
        return out.index_copy(0, self.kept, flat).view(*self.slots, -1)

    def _protected(self, slots: int) -> Tensor:
        """(slots of all images,) tokens that must stay; none for a blank image beside the batch."""
        assert self.question is not None
        protected = self.question.protected_visual
        if len(protected) != slots:
            return torch.zeros(slots, dtype=torch.bool, device=protected.device)
        return protected

    def _images(self, features: Tensor, project: Projector) -> Images:
        extra = None
        if self.tokens is not None:
            features, extra = features.split(
                [features.shape[1] - len(self.tokens), len(self.tokens)], 1
            )
        count, length, _ = features.shape
        pixels = self.pixels if self.shown is None else self.shown
        rows, columns = self.family.grid(pixels)
        full = self.family.grid(self.pixels)
        slots = full[0] * full[1] + length - rows * columns  # CLS may be a visual token, too
        device, flat = features.device, features.flatten(0, 1)
        question, sample = self.question, torch.zeros(count, dtype=torch.long, device=device)
        if question is not None:
            sample = question.sample_of(count, slots)

        def ask() -> Question:
            if question is None:
                raise ValueError("this method needs the question beside the image")
            return question

        return Images(
            features=flat,
            lens=torch.full((count,), length, device=device),
            pixels=pixels,
            slots=torch.full((count,), slots, device=device),
            grid=torch.tensor([[rows, columns]], device=device).expand(count, 2),
            slot_grid=torch.tensor([full], device=device).expand(count, 2),
            sample=sample,
            feature_block=self.family.feature_block,
            has_cls=self.family.has_cls,
            block=self._block,
            projected=lambda: project(flat[None])[0],
            question=lambda: ask().states(sample),
            instruction=lambda: ask().embeddings(sample),
            extra=extra,
        )

    def _block(self, index: int) -> Block:
        if index not in self.blocks:
            raise ValueError(f"vision block {index} was not asked for in `vision_blocks`")
        return self.blocks[index]

    def _note(self, images: Images, keep: Tensor) -> None:
        if self.trace is not None:
            self.trace.score = images.salience("attention")
            self.trace.lens, self.trace.keep = images.slots, keep


def answer_late(
    vision: VisionPass | None, encoded: Any, question: Question, project: Projector
) -> None:
    """Asks the method about images encoded before their question was known.

    Args:
        vision: what waits.
        encoded: the encoder's output; its features, one (S, W) tensor an image, are replaced.
        question: of the rows, which may repeat each sample (beams).
        project: the model's projector.

    Raises:
        ValueError: features that were not encoded just before this call.
    """
    count = len(encoded.pooler_output)
    if vision is None or not _encoded_by(vision, encoded.pooler_output, question):
        raise ValueError(
            "this method needs the question while images are encoded: pass pixel_values, not "
            "features encoded earlier"
        )
    assert vision.waiting is not None
    step = count // len(vision.pixels)
    vision.question = question.every(step)
    features = vision.restore(project(vision.shorten(vision.waiting, project)))
    if step > 1:
        features = features[expanded(question.sequence, features.shape[1], step)]
    encoded.pooler_output = list(features)


def _encoded_by(vision: VisionPass, given: list[Tensor], question: Question) -> bool:
    """Whether features, one (S, W) tensor an image, are those of a pass that waits. Where images
    and placeholders disagree, the host says so."""
    step, rest = divmod(len(given), len(vision.pixels))
    if vision.waiting is None or vision.encoded is None or rest:
        return False
    image = expanded(question.sequence, vision.encoded.shape[1], step)
    return len(image) != len(given) or torch.equal(torch.stack(given), vision.encoded[image])


def pixels_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The pixel argument of a tower call."""
    return args[0] if args else kwargs["pixel_values"]
