"""Balance: several servers as one. Who has least under way gets the next request; a server that
does not answer is left out until it does.

Life is what /health says, asked again and again: a busy server may be silent for minutes and is
waited for, a dead one is noticed while its streams are still open, and these are told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

logger = logging.getLogger(__name__)

T = TypeVar("T")
BEAT = 1.0
"""Seconds between two looks at a server."""
LOOK_SECONDS = 5.0
"""Seconds a look may take."""
MISSES = 3
"""Looks in a row without an answer in time that make a server a dead one."""
MODELS = dict.fromkeys((401, 403), "it does not accept the key")
"""What a status of /v1/models stands for."""


class Gone(Exception):
    """A server that ended, or failed, before it had answered."""


class Unreached(Gone):
    """One that never heard of the request."""


class Upstream:
    """One server.

    Attributes:
        url: where it is, without a path.
        model: what it calls its model; empty: not known yet.
        context: tokens it takes; None: not known yet.
        alive: whether it answered lately.
        why: it is left out, where that was said; else empty.
        under_way: requests it is at work on.
        served: requests it was given so far.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.model = ""
        self.context: int | None = None
        self.alive = False
        self.why = ""
        self.under_way = 0
        self.served = 0
        self.misses = 0
        self.looking = asyncio.Lock()
        self._waits: set[asyncio.Timeout] = set()

    async def unless_gone(self, work: Awaitable[T]) -> T:
        """Waits for something of this server, as long as it lives.

        Raises:
            Gone: it died meanwhile, or the connection did.
        """
        try:
            async with asyncio.timeout(None if self.alive else 0) as wait:
                self._waits.add(wait)
                try:
                    return await work
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            raise Gone("it no longer answers") from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Unreached(type(error).__name__) from None
        except httpx.TransportError as error:
            raise Gone(type(error).__name__) from None

    def bury(self) -> None:
        """It is dead: whoever waits for it is told."""
        self.alive = False
        waits, self._waits = self._waits, set()  # each is told once
        now = asyncio.get_running_loop().time()
        for wait in waits:
            wait.reschedule(now)


class Balancer:
    """Keeps an eye on servers and hands requests out.

    Args:
        urls: of the servers, as `read_urls` returns them.
        client: asks them.
        beat: seconds between two looks.
        look_seconds: that a look may take.
    """

    def __init__(
        self,
        urls: Sequence[str],
        client: httpx.AsyncClient,
        beat: float = BEAT,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        self.upstreams = [Upstream(url) for url in urls]
        self.beat, self.look_seconds = beat, look_seconds
        self._client = client
        self._change = asyncio.Condition()
        self._watchers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Looks at every server once, and from then on again and again."""
        await asyncio.gather(*map(self._look, self.upstreams))
        self._watchers = [asyncio.create_task(self._watch(one)) for one in self.upstreams]

    async def close(self) -> None:
        """Looks no more."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        self._watchers.clear()

    @property
    def alive(self) -> list[Upstream]:
        """Servers that answer."""
        return [one for one in self.upstreams if one.alive]

    # ------------------------------------------------------------------------ handing out
    @asynccontextmanager
    async def lend(
        self, avoid: Collection[Upstream] = (), patience: float = 0.0
    ) -> AsyncIterator[Upstream | None]:
        """The server that has least to do, for one request.

        Args:
            avoid: those to be asked only where there is no other.
            patience: seconds to wait for one to come back where none answers.

        Returns:
            A server; None: none answers.
        """
        upstream = await self._next(avoid, patience)
        if upstream is None:
            yield None
            return
        upstream.under_way += 1
        upstream.served += 1
        try:
            yield upstream
        finally:
            upstream.under_way -= 1

    async def _next(self, avoid: Collection[Upstream], patience: float) -> Upstream | None:
        if not self.alive and patience > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(patience), self._change:
                    await self._change.wait_for(lambda: bool(self.alive))
        alive = self.alive
        fresh = [one for one in alive if one not in avoid] or alive
        return min(fresh, key=lambda one: (one.under_way, one.served), default=None)

    # ------------------------------------------------------------------------ looking
    async def _watch(self, upstream: Upstream) -> None:
        while True:
            await asyncio.sleep(self.beat)
            await self._look(upstream)

    async def _look(self, upstream: Upstream) -> None:
        """Whether a server lives, and what it serves."""
        try:
            async with asyncio.timeout(self.look_seconds):
                answer = await self._client.get(f"{upstream.url}/health")
                if answer.status_code == 200:  # another may answer at this address since
                    await self._introduce(upstream)
        except (TimeoutError, httpx.TimeoutException):  # busy, or stuck
            upstream.misses += 1
            if upstream.misses >= MISSES:
                self._bury(upstream, "it does not answer in time")
            return
        except httpx.HTTPStatusError as error:
            self._bury(upstream, MODELS.get(error.response.status_code, "it names no model"))
            return
        except Exception as error:  # noqa: BLE001  # whatever it says, it is looked at again
            self._bury(upstream, type(error).__name__)
            return
        if answer.status_code != 200:
            self._bury(upstream, f"its health is {answer.status_code}")
            return
        upstream.misses = 0
        if not upstream.alive:
            upstream.alive, upstream.why = True, ""
            logger.info("%s answers, and serves %s", upstream.url, upstream.model)
            async with self._change:
                self._change.notify_all()

    async def _introduce(self, upstream: Upstream) -> None:
        """Asks a server what it calls its model, and how long a prompt may be."""
        answer = await self._client.get(f"{upstream.url}/v1/models")
        card: Any = answer.raise_for_status().json()["data"][0]
        upstream.model = str(card["id"])
        context = card.get("max_model_len")
        upstream.context = None if context is None else int(context)
        if upstream.context is not None and upstream.context < 1:
            raise ValueError("a context that holds nothing")

    def _bury(self, upstream: Upstream, why: str) -> None:
        if upstream.why != why:  # not at every look
            logger.warning("%s is left out until it answers: %s", upstream.url, why)
        upstream.why = why
        upstream.bury()

    async def doubt(self, upstream: Upstream) -> None:
        """A request found a server wanting: it is looked at now, not only at the next beat."""
        async with upstream.looking:  # many requests may find it so at once
            if upstream.alive:
                await self._look(upstream)


def read_urls(text: str) -> tuple[str, ...]:
    """Addresses joined by commas.

    Raises:
        ValueError: one that is none, or stands twice.
    """
    found = [piece.strip().rstrip("/").removesuffix("/v1") for piece in text.split(",")]
    for url in filter(None, found):
        _check_url(url)
    urls = tuple(filter(None, found))
    if not urls:
        raise ValueError("--upstream: name at least one server, such as http://127.0.0.1:8000")
    if len(set(urls)) < len(urls):
        raise ValueError("--upstream: a server is named twice")
    return urls


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        fine = fine and url.split() == [url]
    except ValueError:  # a port that is no number
        fine = False
    if not fine or parts.path or parts.query or parts.fragment:
        raise ValueError(
            f"--upstream: {url!r} is no server's address; write it like http://127.0.0.1:8000"
        )
    if parts.username or parts.password:
        raise ValueError("--upstream: an address holds no password; use --upstream-key-file")
