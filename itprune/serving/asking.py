"""Asking: one question put to one vLLM server, and what it says token by token."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx

from itprune.serving.backend import Broken
from itprune.serving.balance import Gone, Upstream

logger = logging.getLogger(__name__)

LONGEST = 65_536
"""Bytes of a refusal that are read."""
LARGEST = 1 << 24
"""Bytes of an event: the first may hold the numbers of a prompt's tokens."""
KEY = "the servers behind this one do not accept its key"
UNLIKE = "the servers behind this one do not speak vLLM's dialect; its log says more"
FLAGS = ("--enable-prompt-embeds", "--enable-mm-embeds")
FINISH = ("stop", "length")
BUSY = (429, 503)


class Busy(Exception):
    """A server that takes nothing more at present."""


class Refused(ValueError):
    """A server says what is wrong with a request."""


@dataclass(frozen=True)
class Event:
    """What came in one event."""

    ids: Sequence[int]
    finish: str | None


class Asker:
    """Asks servers.

    Args:
        client: its headers hold the key, where there is one.
    """

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def __call__(
        self, upstream: Upstream, path: str, body: Mapping[str, Any]
    ) -> AsyncGenerator[Event]:
        """Streams one answer.

        Args:
            upstream: who is asked.
            path: of the address.
            body: the question, without the name of the model.

        Raises:
            Gone: the server ended, or failed, before the answer did.
            Busy: it takes nothing more.
            Refused: it cannot be answered, by the request's own fault.
            Broken: it cannot be answered by any of these servers.
        """
        whole = {
            **body,
            "model": upstream.model,
            "stream": True,
            "return_token_ids": True,
        }
        request = self._client.build_request("POST", f"{upstream.url}{path}", json=whole)
        response = await upstream.unless_gone(self._client.send(request, stream=True))
        try:
            if response.status_code != 200:
                await self._refuse(upstream, response)
            async with aclosing(_events(upstream, response)) as events:
                async for event in events:
                    yield _read(upstream, event)
        finally:
            await response.aclose()

    async def _refuse(self, upstream: Upstream, response: httpx.Response) -> None:
        """Raises what a status other than 200 stands for."""
        text = b""
        pieces = response.aiter_bytes()
        while len(text) < LONGEST:
            piece = await upstream.unless_gone(anext(pieces, b""))
            if not piece:
                break
            text += piece
        raise refusal(upstream, response.status_code, _message(text))


async def _events(upstream: Upstream, response: httpx.Response) -> AsyncGenerator[Any]:
    """The JSON of server-sent events, up to the last. One without its empty line was cut, and is
    none."""
    data = b""
    async for line in _lines(upstream, response):
        if line.startswith(b"data:"):
            data += line.removeprefix(b"data:").strip()
            if len(data) > LARGEST:
                logger.error("%s sent an event without end", upstream.url)
                raise Broken(UNLIKE)
        if line or not data:
            continue
        if data == b"[DONE]":
            return
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            logger.error("%s sent what is no JSON", upstream.url)
            raise Broken(UNLIKE) from None
        yield found
        data = b""


async def _lines(upstream: Upstream, response: httpx.Response) -> AsyncGenerator[bytes]:
    """Lines that have ended, without their ends."""
    pieces, left = response.aiter_bytes(), b""
    while piece := await upstream.unless_gone(anext(pieces, b"")):
        *lines, left = (left + piece).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")
        if len(left) > LARGEST:
            logger.error("%s sent a line without end", upstream.url)
            raise Broken(UNLIKE)


def _read(upstream: Upstream, event: Any) -> Event:
    try:
        if "error" in event:
            error = event["error"]
            raise refusal(upstream, int(error.get("code") or 500), str(error.get("message")))
        choice = event["choices"][0]
        ids, finish = choice.get("token_ids"), choice.get("finish_reason")
        if ids is None and choice.get("delta", {}).get("role") is None and finish is None:
            raise TypeError("no token_ids")
        found = [int(token) for token in ids or ()]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, Refused):
            raise
        logger.error("%s sent an event without tokens (%s)", upstream.url, error)
        raise Broken(UNLIKE) from None
    if finish not in (None, *FINISH):  # abort, error: it gave the request up
        raise Gone(f"it ended an answer with {finish}")
    return Event(found, finish)


def refusal(upstream: Upstream, status: int, message: str) -> Exception:
    """What an error of a server means to us.

    Args:
        upstream: said so.
        status: of HTTP.
        message: its own words; they go to the log, and to the client where they are about the
            request.
    """
    level = logging.INFO if status in BUSY else logging.WARNING  # the busy are asked again
    logger.log(level, "%s refused a request with %s: %s", upstream.url, status, message)
    missing = next((flag for flag in FLAGS if flag in message), None)
    if missing is not None:
        return Broken(f"the servers behind this one were not started with {missing}")
    if status in (401, 403):
        return Broken(KEY)
    if status < 400 or status in (404, 405):
        return Broken(UNLIKE)
    if status in BUSY:
        return Busy()
    if status < 500:
        words = " ".join(message.split()).partition(". ")[0].rstrip(".")
        return Refused(f"the model's server refuses this request: {words}")
    return Gone(f"it failed with {status}")


def _message(text: bytes) -> str:
    """The words of a refusal."""
    try:
        body = json.loads(text)
        error = body.get("error", body)
        return str(error.get("message") or error.get("detail") or "no reason given")
    except (ValueError, AttributeError):
        return "no reason given"
