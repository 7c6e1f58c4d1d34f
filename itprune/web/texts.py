"""Texts in which nothing is an image place, whatever a stranger typed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from itprune.question import Question


def as_text(text: str, reserved: Iterable[str]) -> str:
    """A text in which nothing is an image place.

    Args:
        text: what was typed.
        reserved: texts a processor takes for an image, as of `Answerer.reserved`.
    """
    for token in reserved:
        text = text.replace(token, f"{token[:1]} {token[1:]}")
    return text


def as_texts(question: Question, reserved: tuple[str, ...]) -> Question:
    """The same of all texts of a question; its own image places stay."""
    messages = [
        {
            **message,
            "content": [
                {**part, "text": as_text(part["text"], reserved)} if "text" in part else part
                for part in message["content"]
            ],
        }
        for message in question.messages
    ]
    return replace(question, messages=tuple(messages))
