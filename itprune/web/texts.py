"""Texts in which nothing is an image place."""

from __future__ import annotations

from collections.abc import Iterable


def as_text(text: str, reserved: Iterable[str]) -> str:
    """A text in which nothing is an image place, whatever a stranger typed.

    Args:
        text: what was typed.
        reserved: texts a processor takes for an image, as of `Answerer.reserved`.
    """
    for token in reserved:
        text = text.replace(token, f"{token[:1]} {token[1:]}")
    return text
