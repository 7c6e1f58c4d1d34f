"""Server: the endpoint's addresses and what they answer. Every refusal has OpenAI's shape.

POST /v1/chat/completions     an answer, whole or as server-sent events
GET  /v1/models[/NAME]        the model
GET  /health                  200: it answers; 503: it is stopping, or nothing can answer
GET  /metrics                 figures for Prometheus
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from itprune.serving import replies
from itprune.serving.backend import Backend, Broken, Piece, Unavailable
from itprune.serving.course import LATE, STOPPING, Course, Gate, Gone, refused
from itprune.serving.images import Pictures
from itprune.serving.keys import Keys, Pace
from itprune.serving.limits import Limits
from itprune.serving.metrics import KIND, Metrics
from itprune.serving.openai_errors import WRONG, ApiError, busy, sentence_of
from itprune.serving.replies import DONE, Reply
from itprune.serving.requests import Reader
from itprune.serving.schema import Chat
from itprune.web.events import EventStream
from itprune.web.guards import Guards

LEFT = 499
"""Status of requests whose clients have left; nobody sees it but the metrics."""
BEAT = 10.0
"""Seconds a stream that waits for its first token is silent; until then a refusal has a status."""
SENTENCES = {404: "there is nothing at this address", 405: "this address does not take that"}
MODELS = "/v1/models"
ADDRESSES = ("/v1/chat/completions", MODELS, "/health", "/metrics")


class Endpoint:
    """Answers requests with one backend.

    Args:
        backend: not started yet.
        limits: for clients.
        keys: who may ask.
        pictures: opens them.
    """

    def __init__(self, backend: Backend, limits: Limits, keys: Keys, pictures: Pictures) -> None:
        self.backend, self.limits, self.keys = backend, limits, keys
        self.gate = Gate()
        self.metrics = Metrics(backend.gauges)
        self._pace = Pace(limits.rate)
        self._reader = Reader(limits, pictures)

    # --------------------------------------------------------------------------- addresses
    async def models(self, http: HttpRequest) -> Response:
        """The model, in a list."""
        self.keys.client(http)
        return JSONResponse(replies.models(self.backend.facts()))

    async def model(self, http: HttpRequest) -> Response:
        """The model, by its name."""
        self.keys.client(http)
        facts = self.backend.facts()
        if http.path_params["name"] != facts.name:
            raise ApiError(404, "there is no such model", "model_not_found", "model")
        return JSONResponse(replies.model(facts))

    async def health(self, http: HttpRequest) -> Response:
        """Whether requests are answered. Needs no key: it tells nothing else."""
        trouble = STOPPING if self.gate.closed else self.backend.trouble()
        if trouble:
            raise busy(sentence_of(Unavailable(trouble)))
        return JSONResponse({"status": "ok"})

    async def figures(self, http: HttpRequest) -> Response:
        """For Prometheus."""
        self.keys.client(http)
        return Response(self.metrics.text(), headers={"content-type": KIND})

    async def chat(self, http: HttpRequest) -> Response:
        """One answer."""
        async with AsyncExitStack() as stack:
            client = self.keys.client(http)
            self._pace.take(client)
            stack.enter_context(self.gate.under_way(self.limits.requests))
            chat, reply, course = await self._begin(http, client)
            stack.push_async_callback(course.close)
            first = asyncio.create_task(course.next())
            stack.callback(first.cancel)
            async with _watched(http, course):
                if not chat.stream:
                    return JSONResponse(await _whole(course, await first, reply))
                await asyncio.wait([first], timeout=BEAT)
            if first.done():
                first.result()  # what was refused gets its status
            events = _events(course, first, reply, chat.usage)
            return EventStream(events, stack.pop_all().aclose, self.limits.seconds)

    async def _begin(self, http: HttpRequest, client: str) -> tuple[Chat, Reply, Course]:
        """Hands a request to the backend; its pictures are held no longer than that takes."""
        facts = self.backend.facts()
        reading = self._reader.reading(http, client, facts)
        async with self.gate.taking_in(), reading as (chat, request, began):
            left = began + self.limits.seconds - time.monotonic()
            try:
                async with asyncio.timeout(left):
                    stream = await self.backend.ask(request)
            except ValueError as error:
                raise refused(error) from None
            except Unavailable as error:
                raise busy(sentence_of(error)) from None
            except Broken as error:
                raise ApiError(500, sentence_of(error), "failed") from None
            except TimeoutError:
                raise busy(LATE) from None
        course = Course(stream, began, self.limits.seconds, self.gate, self.metrics)
        return chat, Reply.to(request, facts), course


def make_app(endpoint: Endpoint, host: str = "127.0.0.1", names: Iterable[str] = ()) -> Starlette:
    """The application; it starts the backend, and ends it.

    Args:
        endpoint: made on no event loop yet.
        host: the address the server is bound to.
        names: further names it goes by.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await endpoint.backend.start()
        try:
            yield
        finally:
            await endpoint.backend.close()

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", endpoint.chat, methods=["POST"]),
            Route(MODELS, endpoint.models),
            Route(f"{MODELS}/{{name:path}}", endpoint.model),
            Route("/health", endpoint.health),
            Route("/metrics", endpoint.figures),
        ],
        middleware=[
            Middleware(Counted, metrics=endpoint.metrics),
            Middleware(Guards, host=host, refuse=_stranger, names=names),
        ],
        exception_handlers={
            ApiError: _refuse,
            HTTPException: _refuse_address,
            ClientDisconnect: _nobody,
            Gone: _nobody,
            Exception: _fail,
        },
        lifespan=lifespan,
    )
    # It would send clients of a proxy with TLS on to http, and their keys with them.
    app.router.redirect_slashes = False
    return app


class Counted:
    """Counts requests by address and status, each once.

    Args:
        app: the application.
        metrics: count.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        def count(status: int) -> None:
            nonlocal begun
            if not begun:
                self.metrics.request(_address(scope["path"]), status)
            begun = True

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except Exception:
            count(500)
            raise


def _address(path: str) -> str:
    """The one of `ADDRESSES` a request is for."""
    if path.startswith(f"{MODELS}/"):
        return MODELS
    return path if path in ADDRESSES else "other"


# ------------------------------------------------------------------------------------- answers
@asynccontextmanager
async def _watched(http: HttpRequest, course: Course) -> AsyncIterator[None]:
    """Ends a course when its client leaves within the block."""

    async def watch() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        course.end(Gone())

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()


async def _whole(course: Course, piece: Piece, reply: Reply) -> Mapping[str, Any]:
    """All pieces together."""
    text = piece.text
    while piece.finish is None:
        piece = await course.next()
        text += piece.text
    return reply.whole(text, piece)


async def _events(
    course: Course, first: asyncio.Task[Piece], reply: Reply, usage: bool
) -> AsyncIterator[str]:
    """The events of a stream; what fails behind its beginning is its last one."""
    while not first.done():  # in line: what stands between may cut silent connections
        yield ": in line\n\n"
        await asyncio.wait([first], timeout=BEAT)
    try:
        piece = first.result()
        yield reply.first() + reply.piece(piece)
        while piece.finish is None:
            piece = await course.next()
            if event := reply.piece(piece):
                yield event
    except ApiError as error:
        yield replies.failure(error)
        return
    except Gone:  # with the first token, when the stream had not begun
        return
    yield (reply.usage(piece.usage) if usage else "") + DONE


# ------------------------------------------------------------------------------------ refusals
def _stranger(sentence: str) -> Response:
    return ApiError(403, sentence, "unknown_host").response()


async def _refuse(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _refuse_address(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentence = SENTENCES.get(error.status_code, "this request cannot be met")
    response = ApiError(error.status_code, sentence, "unknown_address").response()
    response.headers.update(error.headers or {})  # what an address takes
    return response


async def _nobody(http: HttpRequest, error: Exception) -> Response:
    """The client has gone: nobody will see this."""
    return Response(status_code=LEFT)


async def _fail(http: HttpRequest, error: Exception) -> Response:
    """The cause goes to the log, not to the client."""
    return ApiError(500, WRONG, "failed").response()
