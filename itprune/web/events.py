"""Server-sent events, and what is done when nobody reads them any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send


class EventStream(StreamingResponse):
    """Events as they come (text/event-stream).

    Args:
        events: as they are sent.
        left: called when the stream is over, also where the visitor has gone before it began.
        seconds: after which it is cut off, since its visitor may not read it; None: never.
    """

    def __init__(
        self,
        events: AsyncIterator[str],
        left: Callable[[], Awaitable[None]],
        seconds: float | None = None,
    ) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.left, self.seconds = left, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(TimeoutError):  # the server closes what was not completed
                async with asyncio.timeout(self.seconds):
                    await super().__call__(scope, receive, send)
        finally:
            await self.left()
