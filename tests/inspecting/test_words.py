"""The prompt's words: fates, special tokens, runs of visual ones."""

from __future__ import annotations

import torch

from itprune.inspecting.words import Word, fates, joined, prompt_words, spelt


class Letters:
    """A tokenizer whose ids are places in a list."""

    entries = ("<s>", "▁Is", "▁it", "img", "<0xE2>", "\n", "Ġred")
    all_special_ids = (0,)

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.entries[token]

    def decode(self, ids: list[int]) -> str:
        text = self.entries[ids[0]].lstrip("▁Ġ")
        return "\N{REPLACEMENT CHARACTER}" if text.startswith("<0x") else text


def alive(*rows: str) -> dict[int, torch.Tensor]:
    """Segments that begin at layers 0, 2, 4 …; x: alive."""
    return {2 * i: torch.tensor([c == "x" for c in row]) for i, row in enumerate(rows)}


def test_fates() -> None:
    assert fates(alive("xxx.", "xx..", "x..."), 4) == [None, 4, 2, 0]


def test_words_of_a_prompt() -> None:
    ids = [0, 1, 3, 3, 3, 2, 6]
    visual = [i == 3 for i in ids]
    words = prompt_words(ids, visual, alive("xxxx.xx", "xxx..x.", "xx...x."), Letters())
    assert words == [
        Word("<s>", "special"),
        Word(" Is", "text"),
        Word("", "visual", counts=(3, 2, 1, 0)),
        Word(" it", "text"),
        Word(" red", "text", 2),
    ]


def test_a_piece_of_a_character_is_shown_as_in_the_vocabulary() -> None:
    assert spelt(4, Letters()) == "<0xE2>"
    assert spelt(5, Letters()) == "\n"


def test_neighbours_of_one_fate_are_joined() -> None:
    words = [
        Word("<s>", "special"),
        Word("<s>", "special"),
        Word("a", "text"),
        Word("b", "text"),
        Word("c", "text", 2),
        Word("d", "text", 2),
        Word("e", "text", 4),
    ]
    assert [w.text for w in joined(words)] == ["<s>", "<s>", "ab", "cd", "e"]
