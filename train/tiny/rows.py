"""Training rows: many conversations about one picture in one sequence.

The picture's tokens come once; every conversation follows as a branch that sees the picture
and itself but no other branch, at the positions it would have alone. One row so teaches a dozen
answers for the price of one picture, and no answer leaks from one conversation to the next.

Shapes: B rows, T tokens of a row, N = 144 picture tokens (fewer when some are dropped), A
supervised tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from train.scenes.questions import Dialogue

PATCHES = 144


@dataclass
class Rows:
    """A batch ready for the language model.

    Attributes:
        ids: (B, T) token ids; picture positions hold the pad id.
        positions: (B, T) rotary positions.
        mask: (B, 1, T, T) additive attention mask.
        picture: (B, N) patch index fed at sequence places `start .. start + N`.
        start: Sequence place of the first picture token.
        where: (A, 2) row and place whose next token is supervised; `answer` (A,) that token.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    picture: Tensor
    start: int
    where: Tensor
    answer: Tensor


class RowBuilder:
    """Turns conversations into rows with the tokens the processor would give."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.opening = self.encode("<s>USER: ")
        self.newline = self.encode("\n")

    @lru_cache(maxsize=200_000)  # noqa: B019 - one builder lives as long as its process
    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a piece of a conversation; pieces join at word starts."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def branch(self, dialogue: Dialogue) -> tuple[list[int], list[bool]]:
        """Ids of one conversation after the picture, and which of them are supervised."""
        ids: list[int] = [] if dialogue.image else list(self.opening[:-1])
        taught = [False] * len(ids)
        for number, (question, answer) in enumerate(dialogue.turns):
            first = number == 0 and dialogue.image
            lead = "" if first else " " if number == 0 else "USER: "
            asked = self.encode(f"{lead}{question} ASSISTANT:")
            said = self.encode(f" {answer}</s>")
            ids += [*asked, *said]
            taught += [False] * len(asked) + [True] * len(said)
        return ids, taught

    def rows(self, dialogues: Sequence[Sequence[Dialogue]], kept: Tensor) -> Rows:
        """Build a batch.

        Args:
            dialogues: The conversations of each row.
            kept: (B, N) indices of the patches each row sees, ascending.
        """
        start, shown = len(self.opening), kept.shape[1]
        prefix = start + shown + len(self.newline)
        branches = [[(*self.branch(d), d.image) for d in row] for row in dialogues]
        length = prefix + max(sum(len(b[0]) for b in row) for row in branches)
        batch = len(branches)
        ids = torch.full((batch, length), self.tokenizer.pad_token_id)
        positions = torch.zeros(batch, length, dtype=torch.long)
        owner = torch.full((batch, length), -1)
        sees = torch.zeros(batch, length, dtype=torch.bool)
        ids[:, :start] = torch.tensor(self.opening)
        ids[:, start + shown : prefix] = torch.tensor(self.newline)
        positions[:, :start] = torch.arange(start)
        positions[:, start : start + shown] = start + kept
        after = start + PATCHES + len(self.newline)
        positions[:, start + shown : prefix] = torch.arange(start + PATCHES, after)
        owner[:, :prefix] = 0
        where, answer = [], []
        for index, row in enumerate(branches):
            at = prefix
            for number, (tokens, taught, image) in enumerate(row, 1):
                end = at + len(tokens)
                ids[index, at:end] = torch.tensor(tokens)
                begin = after if image else 0
                positions[index, at:end] = torch.arange(begin, begin + len(tokens))
                owner[index, at:end] = number
                sees[index, at:end] = image
                for offset, (token, wanted) in enumerate(zip(tokens, taught, strict=True)):
                    if wanted:
                        where.append((index, at + offset - 1))
                        answer.append(token)
                at = end
        mask = _mask(owner, sees)
        return Rows(ids, positions, mask, kept, start, torch.tensor(where), torch.tensor(answer))


def _mask(owner: Tensor, sees: Tensor) -> Tensor:
    """(B, 1, T, T) additive mask: own branch and, where allowed, the shared prefix."""
    length = owner.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = owner[:, :, None] == owner[:, None, :]
    shared = sees[:, :, None] & (owner[:, None, :] == 0)
    allowed = (same | shared) & causal
    return torch.zeros(allowed.shape).masked_fill_(~allowed, -1e9)[:, None]
