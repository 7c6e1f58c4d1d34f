"""Server: the page's addresses and what they answer. Every refusal is JSON {"error": sentence}."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from importlib.resources import files

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from itprune.app.asking import read_ask
from itprune.app.policy import HEADERS
from itprune.app.session import Ask, Event, Session
from itprune.app.worker import END, Full, Job, Worker
from itprune.web.bodies import Refusal
from itprune.web.events import EventStream
from itprune.web.guards import Guards

STATIC = {
    "/": ("itprune.app", "static/index.html", "text/html"),
    "/app.js": ("itprune.app", "static/app.js", "text/javascript"),
    "/drawing.js": ("itprune.app", "static/drawing.js", "text/javascript"),
    "/style.css": ("itprune.app", "static/style.css", "text/css"),
    "/icon.svg": ("itprune.app", "static/icon.svg", "image/svg+xml"),
    "/pages.css": ("itprune.pages", "style.css", "text/css"),
}
"""Address -> package, file and type: nothing else of the disk can be asked for."""
BEAT = 5.0
"""Seconds of silence after which a stream says that it is still there."""
DECODERS = 2
"""Pictures that are checked at a time; a large one takes a hundred megabytes meanwhile."""
SENTENCES = {404: "there is nothing at this address", 405: "this address does not take that"}


def make_app(
    session: Session, worker: Worker, host: str = "127.0.0.1", names: Iterable[str] = ()
) -> Starlette:
    """The application.

    Args:
        session: answers, and knows what may be asked.
        worker: started; serves the session.
        host: the address the server is bound to.
        names: further names it goes by.
    """
    asker = _Asker(session, worker)
    routes = [Route(path, _static(*where)) for path, where in STATIC.items()]
    routes += [
        Route("/api/model", lambda request: JSONResponse(session.facts())),
        Route("/api/ask", asker.ask, methods=["POST"]),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guards, host=host, refuse=_stranger, names=names, headers=HEADERS)],
        exception_handlers={
            Refusal: _refuse,
            HTTPException: _refuse_address,
            ClientDisconnect: _nobody,
            Exception: _fail,
        },
    )


def _static(package: str, name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = (files(package) / name).read_bytes()

    async def serve(request: Request) -> Response:
        return Response(content, media_type=kind)

    return serve


class _Asker:
    """Takes questions and streams their answers."""

    def __init__(self, session: Session, worker: Worker) -> None:
        self.session, self.worker = session, worker
        self.decoders = asyncio.Semaphore(DECODERS)
        self.uploads = 0
        """Those that are being read or checked; each may hold `body_mb` of memory."""

    async def ask(self, request: Request) -> Response:
        """An upload in, events out as they come (text/event-stream)."""
        if self.worker.full or self.uploads >= self.worker.waiting:  # before the upload is read
            raise _busy()
        self.uploads += 1
        try:
            ask = await self._read(request)
        finally:
            self.uploads -= 1
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(ask, tell)
        try:
            self.worker.join(job)
        except Full:
            raise _busy() from None

        async def left() -> None:
            self.worker.leave(job)

        return EventStream(_lines(events), left)

    async def _read(self, request: Request) -> Ask:
        ask = await read_ask(request, self.session.limits)
        try:
            async with self.decoders:
                await run_in_threadpool(self.session.check, ask)
        except ValueError as error:
            raise Refusal(422, str(error)) from None
        return ask


async def _lines(events: asyncio.Queue[Event]) -> AsyncIterator[str]:
    while True:
        try:
            event = await asyncio.wait_for(events.get(), BEAT)
        except TimeoutError:
            yield ": still here\n\n"
            continue
        yield f"data: {json.dumps(event)}\n\n"
        if event == END:
            return


# ------------------------------------------------------------------------------------ refusals
def _busy() -> Refusal:
    return Refusal(503, "too many questions are waiting; try again in a minute")


def _stranger(sentence: str) -> Response:
    return JSONResponse({"error": sentence}, 403)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    headers = {"retry-after": "60"} if error.status == 503 else {}
    return JSONResponse({"error": error.sentence}, error.status, headers)


async def _refuse_address(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentence = SENTENCES.get(error.status_code, "this request cannot be met")
    return JSONResponse({"error": sentence}, error.status_code)


async def _nobody(request: Request, error: Exception) -> Response:
    """The visitor went while the upload was read: nobody will see this."""
    return Response(status_code=400)


async def _fail(request: Request, error: Exception) -> Response:
    """The cause goes to the terminal, not to the visitor."""
    return JSONResponse({"error": "something went wrong in the server"}, 500)
