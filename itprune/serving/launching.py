"""Launching: uvicorn on a socket that is open already, until it is told to end.

The first signal closes the gate: /health and new requests hear 503, so that a balancer looks
elsewhere, and what is under way is finished, up to a limit. A second one ends everything at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import time
from collections.abc import Iterable
from types import FrameType

import h11
import uvicorn

from itprune.serving.openai_errors import ApiError, busy
from itprune.serving.server import Endpoint, make_app
from itprune.web.connection import Connection

CONNECTIONS = 1024
"""Open at a time; further ones are told that the server is busy."""
CROWDED = busy("too many connections are open; ask again in a moment")
MALFORMED = ApiError(400, "this is not a valid HTTP request, or its head is too large")


class ApiConnection(Connection):
    """One whose requests are refused in OpenAI's shape, even where they cannot be parsed, or where
    it is one too many."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            response = CROWDED.response()
            response.headers["connection"] = "close"  # the next one may find a place
            self.app = response

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(MALFORMED.body()).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        head = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn, which on a signal first lets answers end.

    Args:
        config: of uvicorn.
        endpoint: whose answers these are.
    """

    def __init__(self, config: uvicorn.Config, endpoint: Endpoint) -> None:
        super().__init__(config)
        self.endpoint = endpoint
        self._signals: list[tuple[int, FrameType | None]] = []
        self._until = 0.0
        """When answers under way are cut."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals.append((sig, frame))

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        gate = self.endpoint.gate
        if self._signals and not gate.closed:
            gate.close()
            self._until = time.monotonic() + self.endpoint.limits.drain_seconds
        impatient = len(self._signals) > 1 or time.monotonic() >= self._until
        if gate.closed and (impatient or not gate.running):
            gate.cut()
            super().handle_exit(*self._signals[0])
        return await super().on_tick(counter)


def configure(endpoint: Endpoint, host: str, names: Iterable[str] = ()) -> uvicorn.Config:
    """What uvicorn is told.

    Args:
        endpoint: answers.
        host: the address as the user named it.
        names: further names the server goes by.
    """
    return uvicorn.Config(
        make_app(endpoint, host, names),
        http=ApiConnection,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=5,
    )


def serve(
    endpoint: Endpoint, listener: socket.socket, host: str, names: Iterable[str] = ()
) -> None:
    """Serves until the process is told to end.

    Args:
        endpoint: answers.
        listener: where clients come in.
        host: the address as the user named it.
        names: further names the server goes by.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # How uvicorn hands on a signal it has dealt with.
        with contextlib.suppress(KeyboardInterrupt):
            Server(configure(endpoint, host, names), endpoint).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
