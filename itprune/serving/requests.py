"""Requests: from what came in over HTTP to what a backend is asked, or to a refusal."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn
from weakref import WeakValueDictionary

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest

from itprune.options import check_choice
from itprune.question import Question
from itprune.serving.backend import Facts, Request
from itprune.serving.images import Pictures
from itprune.serving.limits import Limits
from itprune.serving.openai_errors import ApiError, sentence_of
from itprune.serving.schema import Chat, read_chat
from itprune.web.bodies import Refusal, bounded

READERS = 32
"""Requests that are held at a time, from their bodies until a backend has taken in their pictures;
further ones wait in their senders."""
SHARE = READERS // 2
"""Of one client: slow senders among its requests do not hold up those of others."""
DECODERS = 2
"""Requests whose pictures are opened at a time; a large one takes a hundred megabytes meanwhile."""


class Reader:
    """Reads requests.

    Args:
        limits: of the server.
        pictures: opens them.
    """

    def __init__(self, limits: Limits, pictures: Pictures) -> None:
        self.limits, self.pictures = limits, pictures
        self._readers = asyncio.Semaphore(READERS)
        self._shares: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        """Of clients whose requests are being read."""
        self._decoders = asyncio.Semaphore(DECODERS)

    @asynccontextmanager
    async def reading(
        self, http: HttpRequest, client: str, facts: Facts
    ) -> AsyncIterator[tuple[Chat, Request, float]]:
        """What a client wants, what a backend is to do, and when the last byte was there, by
        `time.monotonic`; for a block that takes it in.

        Args:
            http: its body was not read yet.
            client: who sends it.
            facts: of the backend.

        Raises:
            ApiError: it cannot be read, or is beyond a limit.
        """
        share = self._shares.setdefault(client, asyncio.Semaphore(SHARE))
        async with share, self._readers:
            body = await self._body(http)
            began = time.monotonic()
            async with self._decoders:
                chat, request = await run_in_threadpool(self._read, body, facts)
            del body
            yield chat, request, began

    async def _body(self, http: HttpRequest) -> bytes:
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" or "content-encoding" in http.headers:
            raise ApiError(415, "send the request as application/json, not compressed")
        limits = self.limits
        sentence = f"the request is larger than {limits.body_mb:g} MB; send smaller pictures"
        try:
            async with asyncio.timeout(limits.upload_seconds):
                body = [piece async for piece in bounded(http, limits.body_bytes, sentence)]
        except TimeoutError:
            raise ApiError(408, "the request took too long to come in; try again") from None
        except Refusal as refusal:
            raise ApiError(refusal.status, refusal.sentence, "request_too_large") from None
        return b"".join(body)

    def _read(self, body: bytes, facts: Facts) -> tuple[Chat, Request]:
        """Runs in a thread: JSON and pictures take a while."""
        chat = read_chat(_json(body))
        if chat.model != facts.name:
            raise ApiError(
                404,
                f"there is no such model; this server has {facts.name!r}",
                "model_not_found",
                "model",
            )
        return chat, self._request(chat, facts)

    def _request(self, chat: Chat, facts: Facts) -> Request:
        self._check(chat)
        method, keep = chat.method or facts.method, facts.keep if chat.keep is None else chat.keep
        try:
            check_choice("method", method, facts.methods)
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_value", "method") from None
        try:
            self.limits.check_keep(keep)
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_value", "keep") from None
        try:
            question = Question(chat.messages, self.pictures(chat.images))
        except ValueError as error:
            raise ApiError(400, sentence_of(error), "invalid_value", "messages") from None
        seed = secrets.randbits(32) if chat.temperature > 0 else 0
        return Request(
            question=question,
            max_new_tokens=chat.max_new_tokens or self.limits.answer,
            temperature=chat.temperature,
            top_p=chat.top_p,
            seed=seed if chat.seed is None else chat.seed,
            stop=chat.stop,
            method=method,
            keep=keep,
        )

    def _check(self, chat: Chat) -> None:
        limits = self.limits
        if chat.max_new_tokens is not None and chat.max_new_tokens > limits.answer:
            raise ApiError(
                400,
                f"an answer may have up to {limits.answer} tokens here",
                "invalid_value",
                "max_tokens",
            )
        parts = [part for message in chat.messages for part in message["content"]]
        letters = sum(len(part["text"]) for part in parts if part["type"] == "text")
        if letters > limits.text:
            raise ApiError(
                400,
                f"the text has {letters} letters, more than {limits.text}; shorten it",
                "context_length_exceeded",
                "messages",
            )


def _json(body: bytes) -> Any:
    try:
        return json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON", "invalid_json") from None


def _no_number(name: str) -> NoReturn:
    """NaN and Infinity, which JSON does not know and Python reads."""
    raise ValueError(name)
