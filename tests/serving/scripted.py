"""A backend that says what a test tells it, when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from queue import Queue

from itprune.serving.backend import Facts, Gauge, Piece, Request, Usage

COST = Usage(tokens_in=20, tokens_kept=8, visual_in=16, visual_kept=4, tokens_out=1)


def said(text: str, finish: str | None = None) -> Piece:
    """A piece."""
    return Piece(text, COST, finish)


class ScriptedStream:
    """Pieces and errors as they are told."""

    def __init__(self, closed: Queue[str]) -> None:
        self.events: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self.closed = closed

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        event = await self.events.get()
        if isinstance(event, Exception):
            raise event
        return event

    async def aclose(self) -> None:
        self.closed.put("closed")


class Scripted:
    """Takes everything in; a test tells what is said."""

    def __init__(self) -> None:
        self.asked: Queue[tuple[Request, ScriptedStream]] = Queue()
        self.closed: Queue[str] = Queue()
        self.refuse: Exception | None = None
        self.sick = ""
        self.went: list[str] = []

    def facts(self) -> Facts:
        return Facts("tiny", 1024, 1, ("itprune",), "itprune", 0.22)

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.went.append("started")

    async def close(self) -> None:
        self.went.append("closed")

    async def ask(self, request: Request) -> ScriptedStream:
        if self.refuse is not None:
            raise self.refuse
        stream = ScriptedStream(self.closed)
        self.asked.put((request, stream))
        return stream

    def trouble(self) -> str:
        return self.sick

    def gauges(self) -> Sequence[Gauge]:
        return (
            Gauge("waiting", "In line", 3),
            Gauge("upstream_alive", "Alive", 1, {"upstream": "a"}),
            Gauge("upstream_alive", "Alive", 0, {"upstream": "b"}),
        )

    def tell(self, stream: ScriptedStream, *events: Piece | Exception) -> None:
        """Says something, from the test's thread."""
        for event in events:
            self.loop.call_soon_threadsafe(stream.events.put_nowait, event)
