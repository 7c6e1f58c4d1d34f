"""Course: one answer on its way to a client, until it ends or nobody wants it any more.

Gate: which answers are under way, and whether more are taken in.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from itprune.answer import TooLong
from itprune.serving.backend import Broken, Piece, Stream, Unavailable, Usage
from itprune.serving.metrics import Metrics
from itprune.serving.openai_errors import WRONG, ApiError, busy, sentence_of

logger = logging.getLogger(__name__)

STOPPING = "the server is stopping; ask again in a minute"
LATE = "the server did not get to this request in time; ask again later"


class Gone(Exception):
    """The client has left."""


class Gate:
    """Counts what is under way; when it is closed, nothing more is."""

    def __init__(self) -> None:
        self.running = 0
        self.closed = False
        self._over = False
        self._courses: set[Course] = set()
        self._waits: set[asyncio.Timeout] = set()

    def close(self) -> None:
        """Takes nothing more in."""
        self.closed = True

    def cut(self) -> None:
        """Ends all that is under way."""
        self._over = True
        for course in self._courses:
            course.end(busy(STOPPING))
        now = asyncio.get_running_loop().time()
        waits, self._waits = self._waits, set()  # each is told once
        for wait in waits:
            wait.reschedule(now)

    @asynccontextmanager
    async def taking_in(self) -> AsyncIterator[None]:
        """A request that is read and handed over, for the block, which the cut ends.

        Raises:
            ApiError: 503, it was cut.
        """
        try:
            async with asyncio.timeout(0 if self._over else None) as wait:
                self._waits.add(wait)
                try:
                    yield
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            raise busy(STOPPING) from None

    def add(self, course: Course) -> None:
        """One more to be cut."""
        self._courses.add(course)
        if self._over:
            course.end(busy(STOPPING))

    def remove(self, course: Course) -> None:
        """It has ended."""
        self._courses.discard(course)

    @contextmanager
    def under_way(self, most: int) -> Iterator[None]:
        """A request, for the block.

        Args:
            most: that may be under way.

        Raises:
            ApiError: 503, there are as many, or the gate is closed.
        """
        if self.closed:
            raise busy(STOPPING)
        if self.running >= most:
            raise busy("too many requests are under way; ask again in a moment")
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1


class Course:
    """Hands out the pieces of one answer.

    Args:
        stream: of the backend.
        began: when the request was there, by `time.monotonic`.
        seconds: it may take from then on.
        gate: may cut it.
        metrics: are told when it begins and ends.
    """

    def __init__(
        self, stream: Stream, began: float, seconds: float, gate: Gate, metrics: Metrics
    ) -> None:
        self._stream, self._began = stream, began
        self._gate, self._metrics = gate, metrics
        self._events: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
        self._finish = "gone"
        self.usage: Usage | None = None
        """So far; None: there was no token yet."""
        self._pump = asyncio.create_task(self._read())
        left = began + seconds - time.monotonic()
        self._clock = asyncio.get_running_loop().call_later(left, self.end, None)
        gate.add(self)

    async def _read(self) -> None:
        try:
            async for piece in self._stream:
                self._events.put_nowait(piece)
        except ValueError as error:
            self.end(refused(error))
        except Unavailable as error:
            self.end(busy(sentence_of(error)))
        except Broken as error:
            self.end(ApiError(500, sentence_of(error), "failed"))
        except Exception:  # a bug of ours; the client would wait until its time is over
            logger.exception("an answer failed")
            self.end(ApiError(500, WRONG, "failed"))
        else:  # nobody reads this behind a finish
            self.end(ApiError(500, WRONG, "failed"))

    def end(self, error: Exception | None) -> None:
        """Ends the answer behind what it has said.

        Args:
            error: why; None: its time is over.
        """
        self._events.put_nowait(error)

    async def next(self) -> Piece:
        """The next piece; the last one has a finish.

        Raises:
            ApiError: there is none.
            Gone: the client has left.
        """
        event = await self._events.get()
        if isinstance(event, Piece):
            return self._note(event)
        if event is None and self.usage is not None:
            self._finish = "time"
            return Piece("", self.usage, "length")
        self._finish = "gone" if isinstance(event, Gone) else "failed"
        raise event or busy(LATE)

    def _note(self, piece: Piece) -> Piece:
        if self.usage is None:
            self._metrics.first(time.monotonic() - self._began, piece.usage)
        self.usage = piece.usage
        if piece.finish is not None:
            self._finish = piece.finish
        return piece

    async def close(self) -> None:
        """Nobody reads on; the model is told so."""
        self._gate.remove(self)
        self._clock.cancel()
        self._pump.cancel()
        self._metrics.last(self._finish, time.monotonic() - self._began, self.usage)
        await self._stream.aclose()


def refused(error: ValueError) -> ApiError:
    """What a backend says is wrong with a request."""
    if isinstance(error, TooLong):
        return ApiError(400, sentence_of(error), "context_length_exceeded", "messages")
    return ApiError(400, sentence_of(error), "invalid_value")
