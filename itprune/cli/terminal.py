"""Text of strangers on a terminal: what a model says and what files are called may not steer it."""

from __future__ import annotations

import unicodedata
from typing import TextIO

PLAIN = "\n\t"
STEERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that change the order in which letters are shown."""


def harmless(text: str) -> str:
    r"""Control characters, and marks that turn the reading order, spelt out: ESC becomes `\x1b`.

    Line breaks and tabs stay.
    """
    return "".join(_spelt(letter) if _steers(letter) else letter for letter in text)


def _steers(letter: str) -> bool:
    if letter in PLAIN:
        return False
    return letter in STEERING or unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")


def _spelt(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def say(text: str, file: TextIO, end: str = "\n") -> None:
    """Writes at once, harmless, with letters the stream does not know spelt out."""
    known = file.encoding or "utf-8"
    text = harmless(text).encode(known, "backslashreplace").decode(known)
    file.write(text + end)
    file.flush()
