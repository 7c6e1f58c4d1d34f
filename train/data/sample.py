"""Sample: the one internal form of a conversation with images, whatever file it came from.

A reader makes samples, the encoder turns them into tensors. Everything wrong with one sample is a
`BadSample`, which training skips and counts; everything wrong with a whole file is a ValueError,
`LostSource` where it comes up only while samples are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from itprune.question import IMAGE, ROLES


class BadSample(ValueError):
    """One sample cannot be used; the message says why, without its place."""


class LostSource(ValueError):
    """A file that was there has changed or gone; the message names it."""


@dataclass(frozen=True)
class Turn:
    """One message: texts and image places in the order they were written."""

    role: str
    """system, user or assistant."""
    parts: tuple[str, ...]
    """Texts; an image is the part `IMAGE`."""

    @property
    def images(self) -> int:
        return self.parts.count(IMAGE)


@dataclass(frozen=True)
class Sample:
    """A conversation and its images, still unopened (paths, bytes or PIL images)."""

    turns: tuple[Turn, ...]
    images: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.turns:
            raise BadSample("the conversation is empty")
        answers = [t for t in self.turns if t.role == "assistant"]
        if not answers:
            raise BadSample("no assistant turn, so nothing to learn")
        if not all(any(part.strip() for part in turn.parts) for turn in answers):
            raise BadSample("an assistant turn is empty")
        if any(turn.images for turn in answers):
            raise BadSample(f"{IMAGE} stands in an assistant turn")
        places = sum(turn.images for turn in self.turns)
        if places != len(self.images):
            raise BadSample(f"{places} {IMAGE} in the text but {len(self.images)} images")

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        texts = (part for turn in self.turns for part in turn.parts if part != IMAGE)
        return sum(len(text.encode("utf-8", "replace")) for text in texts)


class Records(Protocol):
    """A file of samples with random access; `sample` may raise BadSample or LostSource."""

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample: ...

    def where(self, index: int) -> str:
        """The place of a record, for reports: FILE:LINE or FILE, record N."""
        ...


def role_of(name: Any) -> str:
    """The role of a LLaVA `from` or a message `role`."""
    if not isinstance(name, str) or name not in ROLES:
        raise BadSample(f"unknown role {name!r} (human, gpt, user, assistant, system)")
    return ROLES[name]


def split_text(text: Any) -> tuple[str, ...]:
    """Splits a text at its image places; line breaks around a place belong to the place."""
    if not isinstance(text, str):
        raise BadSample(f"a message must be text, got {type(text).__name__}")
    check_text(text)
    parts: list[str] = []
    for i, piece in enumerate(text.split(IMAGE)):
        if i:
            parts.append(IMAGE)
        if piece.strip():
            parts.append(piece.strip())
    return tuple(parts)


def check_text(text: str) -> None:
    """Refuses half a character: JSON can hold one where a text was cut, a tokenizer cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadSample("a message holds half a character (a lone surrogate)") from None


def image_list(images: Any) -> tuple[Any, ...]:
    """The images of a record: none, one, or a list."""
    if images is None:
        return ()
    return tuple(images) if isinstance(images, list | tuple) else (images,)
