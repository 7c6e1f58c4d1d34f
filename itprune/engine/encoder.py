"""What every way from pixels to visual tokens has in common: listening to the encoder's blocks,
asking the method, and asking late where the question is not known yet.

A dropped slot reaches the LLM as a row of exact zeros: the choice travels inside the features
themselves, through caches of encoder outputs, beam expansion and `generate`, with no state beside
them.
Legend: S slots of all images of a call, W LLM width.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from itprune.engine.question import Question
from itprune.engine.repeats import Repeats
from itprune.families.base import Family
from itprune.methods.base import Method
from itprune.tokens import Images, Kept
from itprune.trace import Trace


class Asker(Protocol):
    """What the vision side asks of the engine."""

    @property
    def family(self) -> Family: ...

    @property
    def method(self) -> Method: ...

    @property
    def trace(self) -> Trace | None: ...

    @property
    def video(self) -> str:
        """frame or clip: what a budget is for."""

    def question(self, kind: str) -> Question | None:
        """The questions beside images or videos; None: the caller's tokens are not known yet."""

    def quiet(self) -> AbstractContextManager[None]:
        """While a method is asked: it may use projector and LLM, and no hook is to mind."""


@dataclass
class EncoderPass(ABC):
    """One run of the encoder: what its hooks gather for the method."""

    asker: Asker
    kind: str
    """image or video."""
    question: Question | None
    encoded: Tensor | None = None
    """(S, W) what was handed out meanwhile, by a pass that waits for the question."""
    open: bool = True
    """False behind the encoder, so that blocks recomputed under checkpointing are not heard."""
    repeats: Repeats | None = None
    """Of the tower's call under way."""

    def wants(self, block: int) -> bool:
        """Whether a block is to be listened to."""
        asker = self.asker
        traced = asker.trace is not None and block == asker.family.feature_block
        return self.open and (traced or block in asker.method.vision_blocks())

    @property
    def waits(self) -> bool:
        """Whether the method cannot be asked yet."""
        return self.question is None and self.asker.method.needs_question

    # ------------------------------------------------------------------------ asking
    def asked(self) -> Question:
        """The question.

        Raises:
            ValueError: it is not known.
        """
        if self.question is None:
            raise ValueError("this method needs the question beside the image")
        return self.question

    def samples(self, first: Tensor, slots: int) -> Tensor:
        """(n,) batch row of each image, by its first of all slots; zeros while not known."""
        question = self.question
        return torch.zeros_like(first) if question is None else question.sample_of(first, slots)

    def protected(self, slots: int) -> Tensor | None:
        """(slots,) bool slots that must stay; None while not known."""
        return None if self.question is None else self.question.protected(slots)

    def choose(self, images: Images, protected: Tensor | None) -> Kept:
        """The method's answer, and beside it what must stay.

        Raises:
            ValueError: a slot must stay, and nothing is known to fill it with.
        """
        kept, trace = self.asker.method(images), self.asker.trace
        keep = kept.keep if protected is None else kept.keep | protected
        if trace is not None:
            trace.score = images.salience("attention")
            trace.lens, trace.keep, trace.grid = images.slots, keep, images.slot_grid
        beside = keep & ~kept.keep
        if kept.features is None or not bool(beside.any()):
            return Kept(keep, kept.features)
        # A protected slot the method left empty holds what was there, where that is known.
        if len(images.features) != len(beside):
            raise ValueError(
                "an answer follows an image directly; put some text between them, or choose a "
                "method that does not shrink the image"
            )
        return Kept(keep, torch.where(beside[:, None], images.features, kept.features))

    # ------------------------------------------------------------------------ listening
    def every_row(self, heard: Tensor) -> Tensor:
        """What is heard in the tower, (u, …), for all its pictures, (n, …)."""
        repeats = self.repeats
        if repeats is None or len(heard) != len(repeats.first):  # a mask may be one for all
            return heard
        return heard[repeats.rows]

    @abstractmethod
    def tap_kwargs(self, block: int) -> dict[str, Any]:
        """What is handed to a block's attention, so that its kernel gives its q and k away."""

    @abstractmethod
    def block_output(self, block: int, output: Any) -> None:
        """A block is through."""

    @abstractmethod
    def late_features(self) -> Tensor:
        """(S, W) of a pass that has waited, now that its question is known."""


Pass = TypeVar("Pass", bound=EncoderPass)


class EncoderHooks(ABC, Generic[Pass]):
    """The hooks on one model's encoder."""

    def __init__(self, asker: Asker) -> None:
        self.asker = asker
        self.current: Pass | None = None
        self.waiting: dict[str, Pass] = {}
        self.repeats: Repeats | None = None
        self.handles: list[RemovableHandle] = []

    def install(self) -> None:
        """Puts the hooks there; those on the tower's call stand behind a subclass's own."""
        family = self.asker.family
        self.handles += [
            family.tower.register_forward_pre_hook(self._show_once, with_kwargs=True),
            family.tower.register_forward_hook(self._lay_out),
        ]
        for index, block in enumerate(family.blocks):
            tap = functools.partial(self._before_attention, index)
            attention = family.block_attention(block)
            self.handles += [
                attention.register_forward_pre_hook(tap, with_kwargs=True),
                block.register_forward_hook(functools.partial(self._after_block, index)),
            ]

    def remove(self) -> None:
        """Takes them away again."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    @property
    def works(self) -> bool:
        """Whether there is anything to do before the LLM."""
        method = self.asker.method
        return not method.idle and method.acts_before_llm

    def _show_once(self, tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self.repeats = Repeats.among(pixels_of(args, kwargs), (*args, *kwargs.values()))
        if self.current is not None:
            self.current.repeats = self.repeats
        if self.repeats is None:
            return None
        once = self.repeats.once
        return tuple(map(once, args)), {name: once(value) for name, value in kwargs.items()}

    def _lay_out(self, tower: nn.Module, args: Any, output: Any) -> Any:
        repeats, self.repeats = self.repeats, None
        if self.current is not None:
            self.current.repeats = None
        return None if repeats is None else repeats.again(output)

    def _before_attention(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.current is None or not self.current.wants(index):
            return None
        return args, {**kwargs, **self.current.tap_kwargs(index)}

    def _after_block(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        if self.current is not None and self.current.wants(index):
            self.current.block_output(index, output)

    def answer_late(self, encoded: dict[str, Any]) -> None:
        """`generate` encodes images before the model sees the prompt: a method that needs the
        question is asked now, and its choice takes the place of the features encoded then.

        Args:
            encoded: image, video -> the encoder's output; its features are replaced.

        Raises:
            ValueError: features that were not encoded just before this call.
        """
        for kind, output in encoded.items():
            question = self.asker.question(kind)
            assert question is not None
            with self.asker.quiet():
                _answer_late(self.waiting.pop(kind, None), output, question)


def _answer_late(vision: EncoderPass | None, output: Any, question: Question) -> None:
    """Rows may repeat each sample (beams): the features then do, too."""
    given, per_row = flat_features(output.pooler_output), question.visual.sum(1)
    if vision is None and bool((given == 0).all(-1).any()):
        return  # chosen already: without a cache `generate` hands over the same output every step
    own = given.new_empty(0) if vision is None or vision.encoded is None else vision.encoded
    step, rest = divmod(len(given), max(len(own), 1))
    if vision is not None and not rest and int(per_row.sum()) != len(given):
        return  # images and placeholders disagree: the host says so
    index = repeated_slots(per_row, max(step, 1))
    if vision is None or rest or not torch.equal(given, own[index]):
        raise ValueError(
            "this method needs the question while images are encoded: pass pixel_values, not "
            "features encoded earlier"
        )
    vision.question = question.every(step)
    output.pooler_output = like(output.pooler_output, vision.late_features()[index])


def pixels_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The pixel argument of a tower call."""
    return args[0] if args else kwargs["pixel_values"]


def flat_features(pooled: Any) -> Tensor:
    """(S, W) of an encoder output's features: one tensor, or one for each image."""
    parts = [
        t.reshape(-1, t.shape[-1]) for t in ((pooled,) if isinstance(pooled, Tensor) else pooled)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def like(pooled: Any, flat: Tensor) -> Any:
    """(S, W) in the form of `pooled`; its own lengths where they add up."""
    if isinstance(pooled, Tensor):
        return flat.view(pooled.shape)
    lens = [t.shape[:-1].numel() for t in pooled]
    return type(pooled)(
        part.view(t.shape) for part, t in zip(flat.split(lens), pooled, strict=True)
    )


def repeated_slots(per_row: Tensor, step: int) -> Tensor:
    """(step * S,) which slot stands at each place once samples are repeated, one behind the other.

    Args:
        per_row: (B * step,) slots of each repeated row.
        step: how often each sample is repeated.
    """
    own = per_row[::step]
    start = (own.cumsum(0) - own).repeat_interleave(step)
    row = torch.repeat_interleave(torch.arange(len(per_row), device=own.device), per_row)
    begin = per_row.cumsum(0) - per_row
    return start[row] + torch.arange(len(row), device=own.device) - begin[row]
