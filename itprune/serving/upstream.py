"""UpstreamBackend: images are encoded here, and vLLM servers elsewhere read what stays of them.

A request that a server takes with it when it dies is put to another one. What was said of its
answer is not said twice: where whole prompts are sent, the next server goes on behind the very
tokens; where only images are, it begins anew, the same tokens are passed over, and should it not
say the same, it is asked to go on behind the text.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing

import httpx

from itprune.decoding import Decoding
from itprune.serving.asking import Asker, Busy, Event, Refused
from itprune.serving.backend import Broken, Facts, Gauge, Piece, Request, Unavailable, Usage
from itprune.serving.balance import BEAT, LOOK_SECONDS, Balancer, Gone, Unreached, Upstream
from itprune.serving.encoder import Encoder, Rows
from itprune.serving.encoding_line import EncodingLine
from itprune.serving.saying import Said
from itprune.serving.wire import Body, Draw, Wire
from itprune.web.texts import as_texts

logger = logging.getLogger(__name__)

DEATHS = 3
"""Servers that may end under one request: it might be its own doing."""
PATIENCE = 20.0
"""Seconds to wait for a server where none answers."""
CONNECT = 5.0
NOBODY = "no server behind this one answers; ask again later"
ALL_BUSY = "all servers behind this one are busy; ask again later"
CUT = "several servers ended at work on this request; it is given up"
UNTRUE = "the servers behind this one ended this answer in a way that cannot be gone on with"


class Diverged(Exception):
    """An answer that was begun anew does not say what was said already."""


class UpstreamStream:
    """The pieces of one answer; the work is under way whether they are read or not."""

    def __init__(self, pieces: AsyncGenerator[Piece]) -> None:
        self._events: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._task = asyncio.create_task(self._pump(pieces))

    async def _pump(self, pieces: AsyncGenerator[Piece]) -> None:
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    self._events.put_nowait(piece)
        except (ValueError, Unavailable, Broken) as error:
            self._events.put_nowait(error)
        except Exception:  # whatever one request does, the next one is served
            logger.exception("a request failed")
            self._events.put_nowait(Broken("the server failed on this request"))

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while True:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if event.finish is not None:
                return

    def whenever_done(self, tell: Callable[[UpstreamStream], None]) -> None:
        """Calls when the work has ended, however."""
        self._task.add_done_callback(lambda task: tell(self))

    async def aclose(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class UpstreamBackend:
    """Answers with servers elsewhere.

    Args:
        encoder: of the questions; is not used elsewhere meanwhile.
        wire: how servers are asked.
        urls: where they are.
        name: what clients call the model.
        names: methods that may be asked for; None: all that fit. The model's own is always among
            them.
        key: sent to the servers as a bearer token; empty: none.
        beat: seconds between two looks at a server.
        patience: seconds to wait for a server where none answers.
        look_seconds: that a look may take; three in a row that take longer mean that it is dead.
        busy_patience: seconds to wait for one that takes more where all are busy.
    """

    def __init__(
        self,
        encoder: Encoder,
        wire: Wire,
        urls: Sequence[str],
        name: str,
        names: Sequence[str] | None = (),
        key: str = "",
        beat: float = BEAT,
        patience: float = PATIENCE,
        look_seconds: float = LOOK_SECONDS,
        busy_patience: float = 0.0,
    ) -> None:
        self.encoder, self.wire = encoder, wire
        self.patience, self.busy_patience = patience, busy_patience
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(None, connect=CONNECT),  # life is what /health says
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )
        self.balancer = Balancer(urls, self._client, beat, look_seconds)
        self._ask = Asker(self._client)
        self._line = EncodingLine(encoder)
        offered = encoder.methods if names is None else (encoder.method, *names)
        self._offered = tuple(dict.fromkeys(offered))
        for one in self._offered:
            encoder.check(one, encoder.usual_keep)
        self._name, self._created = name, int(time.time())
        self._streams: set[UpstreamStream] = set()
        self.again = 0
        """Requests put to another server."""

    # ------------------------------------------------------------------------ what the server asks
    def facts(self) -> Facts:
        encoder = self.encoder
        return Facts(
            self._name,
            self._context,
            self._created,
            self._offered,
            encoder.method,
            encoder.usual_keep,
        )

    @property
    def _context(self) -> int:
        """Tokens that every server known takes."""
        own = self.encoder.context
        return min([own, *(u.context for u in self.balancer.upstreams if u.context is not None)])

    async def start(self) -> None:
        await self.balancer.start()

    async def close(self) -> None:
        for stream in list(self._streams):
            await stream.aclose()
        self._line.close()
        await self.balancer.close()
        await self._client.aclose()

    def trouble(self) -> str:
        return "" if self.balancer.alive else NOBODY

    def gauges(self) -> Sequence[Gauge]:
        upstreams = self.balancer.upstreams
        lines = [Gauge("encode_queue", "Requests whose images wait.", self._line.waiting)]
        lines.append(Gauge("upstream_again", "Requests put to another server.", self.again))
        for one in upstreams:
            where = {"upstream": one.url}
            lines.append(Gauge("upstream_up", "1: it answers.", float(one.alive), where))
            lines.append(Gauge("upstream_under_way", "Its requests.", one.under_way, where))
        return lines

    # ------------------------------------------------------------------------ one request
    async def ask(self, request: Request) -> UpstreamStream:
        """Takes a request in: its images are encoded when this returns.

        Raises:
            ValueError: what is wrong with the request.
            Broken: the encoder failed on it.
        """
        self.encoder.check(request.method, request.keep)
        question = as_texts(request.question, self.encoder.answerer.reserved)
        rows = await self._line.encode(question, request.method, request.keep)
        room = min(request.max_new_tokens, rows.room(self._context))
        stream = UpstreamStream(self._pieces(request, rows, room))
        self._streams.add(stream)
        stream.whenever_done(self._streams.discard)
        return stream

    async def _pieces(self, request: Request, rows: Rows, room: int) -> AsyncGenerator[Piece]:
        answer = Answering(self, request, rows, room)
        met: list[Upstream] = []
        while True:
            async with self.balancer.lend(met, self.patience) as upstream:
                if upstream is None:
                    raise Unavailable(NOBODY)
                self.again += bool(met)
                met.append(upstream)
                try:
                    async with aclosing(answer.on(upstream)) as pieces:
                        async for piece in pieces:
                            yield piece
                            if piece.finish is not None:
                                return
                    raise Gone("it said nothing more")
                except (Gone, Busy, Diverged) as error:
                    await self._excuse(error, upstream, answer, met)

    async def _excuse(
        self, error: Exception, upstream: Upstream, answer: Answering, met: Sequence[Upstream]
    ) -> None:
        """Takes note of why an answer is to be had elsewhere.

        Args:
            error: why.
            upstream: who did not give it.
            answer: so far.
            met: who was asked up to now.

        Raises:
            Unavailable: all are busy.
            Broken: it might be the request's own doing.
        """
        if isinstance(error, Busy):
            if set(self.balancer.alive) <= set(met):
                if answer.waited >= self.busy_patience:
                    raise Unavailable(ALL_BUSY) from None
                answer.waited += self.balancer.beat
                await asyncio.sleep(self.balancer.beat)
        elif isinstance(error, Diverged):
            answer.behind_text = True
        else:
            logger.warning("%s did not end an answer: %s", upstream.url, error)
            await self.balancer.doubt(upstream)
            answer.deaths += not isinstance(error, Unreached)
            if answer.deaths >= DEATHS:
                raise Broken(CUT) from None
            if upstream.alive and set(self.balancer.alive) <= set(met):  # it would be asked again
                await asyncio.sleep(self.balancer.beat)


class Answering:
    """One answer, over as many servers as it takes.

    Args:
        backend: asks.
        request: what for.
        rows: its question.
        room: tokens it may have.
    """

    def __init__(self, backend: UpstreamBackend, request: Request, rows: Rows, room: int) -> None:
        self._backend, self._request, self._rows, self.room = backend, request, rows, room
        answerer = backend.encoder.answerer
        self.said = Said(answerer.processor.tokenizer, request.stop)
        self._stops = answerer.stops
        self.behind_text = False
        """The next server is to go on behind the text, not to begin anew."""
        self.deaths = 0
        """Servers that ended, or failed, at work on it."""
        self.waited = 0.0
        """Seconds, for servers that were busy."""

    async def on(self, upstream: Upstream) -> AsyncGenerator[Piece]:
        """Goes on with the answer on a server.

        Raises:
            Gone, Busy, Diverged: another one is to be asked.
            ValueError, Broken: none is.
        """
        known = list(self.said.ids)
        finish = self._finished()
        if finish is not None:
            yield self._piece(self.said.rest(), finish)
            return
        wire = self._backend.wire
        goes_on = bool(known) and (wire.exact or self.behind_text)
        body = await asyncio.to_thread(self._body, known if goes_on else [])
        passing = [] if goes_on else known
        async with aclosing(self._events(upstream, wire.path, body)) as events:
            async for event in events:
                fresh = list(event.ids)
                while fresh and passing:
                    if fresh.pop(0) != passing.pop(0):
                        raise Diverged
                for piece in self._take(fresh, event.finish):
                    yield piece
                    if piece.finish is not None:
                        return

    async def _events(self, upstream: Upstream, path: str, body: Body) -> AsyncGenerator[Event]:
        try:
            async with aclosing(self._backend._ask(upstream, path, body)) as events:
                async for event in events:
                    yield event
        except Refused:
            if self.said.ids:  # it was in order before
                raise Broken(UNTRUE) from None
            raise

    def _body(self, known: list[int]) -> Body:
        wire, rows, request = self._backend.wire, self._rows, self._request
        left = self.room - len(known)
        decoding = Decoding(left, request.temperature, request.top_p, request.seed)
        asked = wire.go_on(rows, known, self.said.whole()) if known else wire.ask(rows)
        return {**asked, **Draw.of(self._backend.encoder.answerer, decoding).to_body()}

    def _take(self, ids: list[int], finish: str | None) -> list[Piece]:
        """What new tokens, or the end, bring."""
        text = ""
        for token in ids:
            text += self.said.add(token)
            if self.said.ended:
                return [self._piece(text + self.said.rest(), "stop")]
        finish = finish or self._finished()  # whatever a server does, an answer ends
        if finish is not None:
            return [self._piece(text + self.said.rest(), finish)]
        return [self._piece(text, None)] if ids else []

    def _finished(self) -> str | None:
        """How an answer ends that has its last token, where no server says so."""
        ids = self.said.ids
        if ids and ids[-1] in self._stops:
            return "stop"
        return "length" if len(ids) >= self.room else None

    def _piece(self, text: str, finish: str | None) -> Piece:
        rows = self._rows
        usage = Usage(
            rows.tokens_in,
            rows.tokens_kept,
            rows.visual_in,
            rows.visual_kept,
            len(self.said.ids),
        )
        return Piece(text, usage, finish)
