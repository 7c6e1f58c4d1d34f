"""Words: the tokens of a prompt as text, and the layer each leaves before.

A run of visual tokens is one word: what became of it stands in the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

SPACES = ("▁", "Ġ")
"""How vocabularies write a space before a word."""


@dataclass(frozen=True)
class Word:
    """One text token, or a run of visual ones."""

    text: str
    kind: str
    """text, special (one of the tokenizer's special tokens) or visual."""
    left: int | None = None
    """0: before the LLM; k: before layer k; None: it stays. Of text and special tokens."""
    counts: tuple[int, ...] = ()
    """Of a visual run: its tokens, and how many are alive in each segment of layers."""


def fates(alive: Mapping[int, Tensor], length: int) -> list[int | None]:
    """The first layer each position is absent from; None: it reaches the end.

    Args:
        alive: first layer of each segment -> (length,) bool.
        length: of the prompt.
    """
    out: list[int | None] = [None] * length
    for layer in sorted(alive, reverse=True):
        for position in (~alive[layer]).nonzero()[:, 0].tolist():
            out[position] = layer
    return out


def prompt_words(
    ids: Sequence[int], visual: Sequence[bool], alive: Mapping[int, Tensor], tokenizer: Any
) -> list[Word]:
    """The words of a prompt.

    Args:
        ids: its tokens.
        visual: which of them are visual.
        alive: first layer of each segment -> (T,) bool.
        tokenizer: of the model.
    """
    special = set(tokenizer.all_special_ids)
    left, words, start = fates(alive, len(ids)), list[Word](), 0
    while start < len(ids):
        if visual[start]:
            end = start
            while end < len(ids) and visual[end]:
                end += 1
            counts = (int(alive[layer][start:end].sum()) for layer in sorted(alive))
            words.append(Word("", "visual", counts=(end - start, *counts)))
            start = end
            continue
        kind = "special" if ids[start] in special else "text"
        words.append(Word(spelt(ids[start], tokenizer), kind, left[start]))
        start += 1
    return words


def spelt(token: int, tokenizer: Any) -> str:
    """One token as text, with the space before a word; as in the vocabulary where it is no whole
    character."""
    entry = str(tokenizer.convert_ids_to_tokens(token))
    text = str(tokenizer.decode([token]))
    if "\N{REPLACEMENT CHARACTER}" in text:
        return entry
    return f" {text}" if entry.startswith(SPACES) and not text.startswith(" ") else text


def joined(words: Sequence[Word]) -> tuple[Word, ...]:
    """Neighbours of one kind and one fate as one word."""
    out: list[Word] = []
    for word in words:
        last = out[-1] if out else None
        if last is not None and word.kind == "text" == last.kind and word.left == last.left:
            out[-1] = Word(last.text + word.text, "text", word.left)
        else:
            out.append(word)
    return tuple(out)
