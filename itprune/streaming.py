"""Tokens of an answer while `generate` is still at work: a thread runs the model, the caller reads.

The model is never interrupted in the middle of a forward, which would leave hooks and cache half
done: who has read enough stops the stream, and the forward under way is the last.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class TokenStream(StoppingCriteria):
    """Hands out the tokens of one row; give it to `generate` among its stopping criteria.

    Args:
        work: runs the model with this criterion; called once, in a thread of its own.
    """

    def __init__(self, work: Callable[[TokenStream], Any]) -> None:
        self._tokens: SimpleQueue[int | None] = SimpleQueue()
        self._stop = threading.Event()
        pool = ThreadPoolExecutor(1, "itprune-answer")
        self._future = pool.submit(work, self)
        self._future.add_done_callback(lambda future: self._tokens.put(None))
        pool.shutdown(wait=False)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """(B, S) tokens so far -> (B,) bool, whether to stop."""
        self._tokens.put(int(input_ids[0, -1]))
        stop = self._stop.is_set()
        return torch.full((len(input_ids),), stop, dtype=torch.bool, device=input_ids.device)

    def __iter__(self) -> Iterator[int]:
        """The tokens as they come, until the work has ended."""
        while (token := self._tokens.get()) is not None:
            yield token

    def wait(self) -> None:
        """Ends the work, whatever comes of it."""
        self._stop.set()
        wait([self._future])

    def finish(self) -> Any:
        """Ends the work behind the forward under way.

        Returns:
            What the work returned; what it raised is raised here.
        """
        self._stop.set()
        return self._future.result()


class Text:
    """The text of a growing list of tokens, in pieces that together are the whole.

    Half of a letter waits for its other half, and space for what stands behind it.
    """

    BROKEN = "\ufffd"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.ids: list[int] = []
        self.said = ""

    def add(self, token: int) -> str:
        """What is new with one more token; often nothing."""
        self.ids.append(token)
        return self._new(self.whole().rstrip(self.BROKEN).rstrip())

    def rest(self) -> str:
        """What still waits when no token follows."""
        return self._new(self.whole())

    def whole(self) -> str:
        """All of it, as `Answerer` would say it."""
        text: str = self._tokenizer.decode(self.ids, skip_special_tokens=True)
        return text.strip()

    def _new(self, text: str) -> str:
        if not text.startswith(self.said):  # a tokenizer that changes what it has said: wait
            return ""
        new = text[len(self.said) :]
        self.said = text
        return new
