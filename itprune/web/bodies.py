"""Bodies of requests, read up to a limit."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from starlette.requests import Request

DRAIN = 4
"""Times the limit a refused body is read on, so that its sender hears the answer."""


class Refusal(Exception):
    """An answer to a request that cannot be met: an HTTP status and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


async def bounded(request: Request, most: int, sentence: str) -> AsyncGenerator[bytes, None]:
    """The body, piece by piece.

    Args:
        request: its body was not read yet.
        most: bytes it may have.
        sentence: to whom sends more.

    Raises:
        Refusal: it is larger.
    """
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= most:
            yield chunk
        elif size > DRAIN * most:
            break
    if size > most:
        raise Refusal(413, sentence)
