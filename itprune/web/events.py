"""Server-sent events, and what is done when nobody reads them any more."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send


class EventStream(StreamingResponse):
    """Events as they come (text/event-stream).

    Args:
        events: as they are sent.
        left: called when the stream is over, also where the visitor has gone before it began.
    """

    def __init__(self, events: AsyncIterator[str], left: Callable[[], Awaitable[None]]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.left = left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.left()
