"""Serving: uvicorn on a socket that is open already, until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterable
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from itprune.app.server import make_app
from itprune.app.session import Session
from itprune.app.worker import Worker

CONNECTIONS = 256
"""Open at a time; further ones are told that the server is busy."""
HEAD_SECONDS = 10.0
"""Longest time a request may take until its last header; uvicorn itself would wait for ever."""


class Connection(H11Protocol):
    """A connection that is closed where no whole request comes, so that visitors who say nothing,
    or a letter now and then, cannot hold all that there are."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # a request is at work
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Server(uvicorn.Server):
    """uvicorn, which on a signal also ends the answers that are being streamed; it would wait for
    them otherwise.

    Args:
        config: of uvicorn.
        worker: to close.
    """

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self.worker = worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.worker.close(wait=False)
        super().handle_exit(sig, frame)


def configure(
    session: Session, worker: Worker, host: str, names: Iterable[str] = ()
) -> uvicorn.Config:
    """What uvicorn is told.

    Args:
        session: the model.
        worker: started; serves the session.
        host: the address as the user named it.
        names: further names the server goes by.
    """
    return uvicorn.Config(
        make_app(session, worker, host, names),
        http=Connection,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=5,
    )


def serve(session: Session, listener: socket.socket, host: str, names: Iterable[str] = ()) -> None:
    """Serves until the process is told to end.

    Args:
        session: the model.
        listener: where visitors come in.
        host: the address as the user named it.
        names: further names the server goes by.
    """
    worker = Worker(session, session.limits.waiting)
    worker.start()
    config = configure(session, worker, host, names)
    try:
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn has dealt with
            Server(config, worker).run(sockets=[listener])
    finally:
        worker.close()
