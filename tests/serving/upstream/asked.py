"""A backend with servers elsewhere, and questions to it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from itprune.question import Question
from itprune.serving.backend import Piece, Request
from itprune.serving.encoder import Encoder
from itprune.serving.upstream import UpstreamBackend
from itprune.serving.wire import WIRES
from tests.serving.upstreams import Server

KEEP = 0.5
TOKENS = 20
BOTH = pytest.mark.parametrize("wire", list(WIRES))


class Asked:
    """A backend, started for the block, and answers from it."""

    def __init__(
        self, encoder: Encoder, servers: Sequence[Server], wire: str = "prompt", **more: Any
    ) -> None:
        given = {"beat": 0.05, "patience": 0.0, **more}
        urls = [server.url for server in servers]
        self.backend = UpstreamBackend(encoder, WIRES[wire](encoder), urls, "tiny", **given)

    async def __aenter__(self) -> Asked:
        await self.backend.start()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.backend.close()

    async def pieces(self, question: Question, **changes: Any) -> list[Piece]:
        return [piece async for piece in await self.stream(question, **changes)]

    async def stream(self, question: Question, **changes: Any) -> Any:
        return await self.backend.ask(replace(request(question), **changes))

    async def text(self, question: Question, **changes: Any) -> str:
        return said(await self.pieces(question, **changes))


def request(question: Question) -> Request:
    return Request(question, TOKENS, 0.0, 1.0, 0, (), "itprune", KEEP)


def said(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


async def until(true: Any) -> None:
    """Waits for something that another process does."""
    async with asyncio.timeout(30):
        while not await asyncio.to_thread(true):
            pass
