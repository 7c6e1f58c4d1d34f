"""Streaming: an Answerer that tells each piece of an answer as it comes.

It listens as a logits processor that leaves the logits alone, so tokens and text are those of
`itprune infer`. A processor is called between tokens: a piece is told when the next token has been
computed, and whoever asked may end the answer there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from itprune.answer import Answer, Answerer, Encoded
from itprune.checkpoint import Loaded
from itprune.decoding import Decoding
from itprune.streaming import Text


class Stopped(Exception):
    """Nobody waits for this answer any more."""


@dataclass
class Listener:
    """What to do while an answer is made."""

    prefilled: Callable[[], None]
    """The prompt is through, and the trace is filled. Called behind the first token, so that what
    is done here is not in its time."""
    piece: Callable[[str], None]
    """The next piece of text."""
    stopped: Callable[[], bool]
    """Whether to give up."""
    seconds: float
    """After how long the answer is cut."""
    late: bool = field(default=False, init=False)
    """Whether it was."""


class StreamingAnswerer(Answerer):
    """Answers one question at a time, and tells a listener about it."""

    def __init__(self, loaded: Loaded, decoding: Decoding) -> None:
        super().__init__(loaded, decoding)
        self._between: LogitsProcessorList = LogitsProcessorList()

    def stream(self, encoded: Encoded, listener: Listener) -> Answer:
        """Answers, telling the listener; the pieces joined are the beginning of the answer.

        Raises:
            Stopped: the listener gave up.
            ValueError: see `Answerer.answer`.
        """
        between = _Between(listener, self.processor.tokenizer, self.stops[0])
        self._between = LogitsProcessorList([between])
        try:
            answer = self.answer([encoded])[0]
        finally:
            self._between = LogitsProcessorList()
        between.first()
        if answer.answer.startswith(between.text.said):  # what the last token brought
            between.tell(answer.answer[len(between.text.said) :])
        return answer

    def sampler(self, batch: Sequence[Encoded]) -> LogitsProcessorList:
        return LogitsProcessorList([*super().sampler(batch), *self._between])


class _Between(LogitsProcessor):
    """Called with (1, T) ids and (1, vocab) logits before each token is drawn."""

    def __init__(self, listener: Listener, tokenizer: Any, stop: int) -> None:
        self.listener, self.stop = listener, stop
        self.text = Text(tokenizer)
        self.began = self.drawn = False
        self.end = time.monotonic() + listener.seconds

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.listener.stopped():
            raise Stopped
        if self.began:
            self.first()
            self.tell(self.text.add(int(input_ids[0, -1])))
        self.began = True
        if time.monotonic() < self.end:
            return scores
        self.listener.late = True
        ended = torch.full_like(scores, float("-inf"))
        ended[:, self.stop] = 0
        return ended

    def first(self) -> None:
        """Tells, once, that the prompt is through."""
        if not self.drawn:
            self.drawn = True
            self.listener.prefilled()

    def tell(self, piece: str) -> None:
        """Hands a piece on, where there is one."""
        if piece:
            self.listener.piece(piece)
