"""What rows of a running batch say: how their next tokens are drawn, and the text these make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from itprune.answer import Answerer
from itprune.decoding import Decoding, RowSampler
from itprune.streaming import Text


class Decoded:
    """The text of a growing list of tokens, without decoding all of them each time.

    What stands far behind is settled: only tokens since then are decoded, with some before them for
    the sake of spaces. Where that is not what the whole would be, the whole is decoded for good.

    Args:
        tokenizer: of the model.
    """

    EVERY, CONTEXT = 64, 8

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._settles = True
        self._settled = ("", "", 0)
        """Text so far, that of the context alone, and how many tokens they stand for."""

    def __call__(self, ids: list[int]) -> str:
        """The text of tokens that begin with those of the call before."""
        if self._settles and len(ids) >= self._settled[2] + self.EVERY + self.CONTEXT:
            self._settle(ids)
        text, context, end = self._settled
        if not end:
            return self._decode(ids)
        new = self._decode(ids[end - self.CONTEXT :])
        if not new.startswith(context):
            return self._decode(ids)
        return text + new[len(context) :]

    def _settle(self, ids: list[int]) -> None:
        end = len(ids) - self.CONTEXT
        text = self._decode(ids[:end])
        if text.endswith(Text.BROKEN):  # in the middle of a letter
            return
        self._settled = (text, self._decode(ids[end - self.CONTEXT : end]), end)
        self._settles = False  # until it is seen to be right
        self._settles = self(ids) == self._decode(ids)
        if not self._settles:
            self._settled = ("", "", 0)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class Said(Text):
    """The text of an answer, piece by piece, up to the first of its stop strings.

    What may be the beginning of a stop string waits for what follows.

    Args:
        tokenizer: of the model.
        stop: texts that end the answer and are no part of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        super().__init__(tokenizer)
        self.stop = tuple(text for text in stop if text)
        self._decoded = Decoded(tokenizer)
        self.ended = False
        """A stop string was said."""

    def whole(self) -> str:
        text = self._decoded(self.ids)
        ends = [at for at in map(text.lstrip().find, self.stop) if at >= 0]
        self.ended = bool(ends)
        return (text.lstrip()[: min(ends)] if ends else text).strip()

    def _new(self, text: str) -> str:
        if self.ended:
            return super()._new(self.whole())
        return super()._new(text[: len(text) - self._waiting(text)].rstrip())

    def rest(self) -> str:
        return super()._new(self.whole())

    def _waiting(self, text: str) -> int:
        """Letters at the end that begin a stop string."""
        sizes = {size for stop in self.stop for size in range(1, len(stop))}
        return max((n for n in sizes if n <= len(text) and self._begins(text[-n:])), default=0)

    def _begins(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self.stop)


class Speaker(Protocol):
    """What the sampler asks of a row."""

    @property
    def decoding(self) -> Decoding: ...

    @property
    def stream(self) -> torch.Generator:
        """The row's own randomness."""

    @property
    def seen(self) -> list[int]:
        """Tokens of prompt and answer so far."""

    @property
    def own(self) -> LogitsProcessorList:
        """From `Sampler.own`."""


class Sampler:
    """Draws the next token of every row, as `generate` and `RowSampler` would of each alone.

    Args:
        answerer: of the model, whose own generation config may change scores.
    """

    AT_ONCE = (SuppressTokensLogitsProcessor, RepetitionPenaltyLogitsProcessor)
    """Processors that do not mind how often a token stands in a row, nor where."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self._usual = _processors(answerer, [answerer.stops[0]], 1)
        self._together = all(type(processor) in self.AT_ONCE for processor in self._usual)

    def own(self, prompt: Sequence[int], room: int) -> LogitsProcessorList:
        """What the model's generation config does to the scores of one answer. Some of it counts
        from the prompt's end, or up to that of the longest answer.

        Args:
            prompt: its tokens.
            room: tokens the answer may have.
        """
        return self._usual if self._together else _processors(self._answerer, prompt, room)

    def __call__(self, rows: Sequence[Speaker], logits: Tensor) -> Tensor:
        """(B, vocab) logits -> (B,) tokens."""
        scores = self._processed(rows, logits.float())
        ways: dict[tuple[float, float], list[int]] = {}
        for index, row in enumerate(rows):
            if row.decoding.temperature > 0:
                way = (row.decoding.temperature, row.decoding.top_p)
                ways.setdefault(way, []).append(index)
        for indices in ways.values():
            sampler = RowSampler(rows[indices[0]].decoding, ())
            sampler.streams = [rows[index].stream for index in indices]
            if len(indices) == len(rows):
                return sampler(scores, scores).argmax(-1)
            where = torch.tensor(indices, device=scores.device)
            drawn = sampler(scores, scores.index_select(0, where))
            scores = scores.index_copy(0, where, drawn)
        return scores.argmax(-1)

    def _processed(self, rows: Sequence[Speaker], scores: Tensor) -> Tensor:
        if not self._usual:
            return scores
        seen, device = [row.seen for row in rows], scores.device
        if self._together:  # a row's first token, again and again, fills it up
            longest = max(map(len, seen))
            ids = [own[:1] * (longest - len(own)) + own for own in seen]
            return self._usual(torch.tensor(ids, device=device), scores)
        parts = [
            row.own(torch.tensor([ids], device=device), scores[index : index + 1])
            for index, (row, ids) in enumerate(zip(rows, seen, strict=True))
        ]
        return torch.cat(parts)


def _processors(answerer: Answerer, prompt: Sequence[int], room: int) -> LogitsProcessorList:
    """What `generate` does to scores by the model's own generation config."""
    found: list[LogitsProcessorList] = []

    def take(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        found.append(kwargs["logits_processor"])
        return input_ids

    model: Any = answerer.model
    ids = torch.tensor([prompt], device=model.device)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=answerer.settings(room),
        custom_generate=take,
    )
    return found[0]
