"""EncodingLine: questions wait for the vision half of the model, which takes several at a time."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from itprune.question import Question
from itprune.serving.backend import Broken
from itprune.serving.encoder import Encoder, Prepared, Rows

logger = logging.getLogger(__name__)

TOGETHER = 8
"""Questions encoded at once."""
FAILED = "the model failed on these images; the log of the server says why"


@dataclass(eq=False)
class Waiting:
    """One of the line."""

    prepared: Prepared
    setting: tuple[str, float]
    """Method and keep."""
    rows: asyncio.Future[Rows] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class EncodingLine:
    """Encodes questions of many requests, those of one setting together.

    For one event loop. Tokenizers and image processors are not made for several threads, nor is
    the encoder: each has one.

    Args:
        encoder: not used elsewhere meanwhile.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._line: deque[Waiting] = deque()
        self._prepare = ThreadPoolExecutor(1, "itprune-prepare")
        self._encode = ThreadPoolExecutor(1, "itprune-encode")
        self._server: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Questions in the line."""
        return len(self._line)

    def close(self) -> None:
        """Ends the work."""
        if self._server is not None:
            self._server.cancel()
        for pool in (self._prepare, self._encode):
            pool.shutdown(wait=True, cancel_futures=True)

    async def encode(self, question: Question, method: str, keep: float) -> Rows:
        """What stays of a question.

        Raises:
            ValueError: what is wrong with it.
            Broken: the encoder failed on it.
        """
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self._prepare, self._encoder.prepare, question)
        if not question.images:
            return self._encoder.text(prepared)
        one = Waiting(prepared, (method, keep))
        self._line.append(one)
        if self._server is None or self._server.done():
            self._server = loop.create_task(self._serve())
        try:
            return await one.rows
        finally:  # also where nobody waits any more
            if one in self._line:
                self._line.remove(one)

    async def _serve(self) -> None:
        """Until the line is empty."""
        loop = asyncio.get_running_loop()
        while self._line:
            group = self._next()
            found = await loop.run_in_executor(self._encode, self._together, group)
            for one, rows in zip(group, found, strict=True):
                if one.rows.done():  # nobody waits
                    continue
                if isinstance(rows, Exception):
                    one.rows.set_exception(rows)
                else:
                    one.rows.set_result(rows)

    def _next(self) -> list[Waiting]:
        """The first of the line, and others with its setting."""
        setting = self._line[0].setting
        group = [one for one in self._line if one.setting == setting][:TOGETHER]
        for one in group:
            self._line.remove(one)
        return group

    def _together(self, group: list[Waiting]) -> Sequence[Rows | Exception]:
        """One result each. What ends the work on several is looked for one by one."""
        try:
            return self._encoder.each([one.prepared for one in group], *group[0].setting)
        except Exception:  # told to whoever waits
            if len(group) > 1:
                return [found for one in group for found in self._together([one])]
            logger.exception("the encoder failed")
            return [Broken(FAILED)]
