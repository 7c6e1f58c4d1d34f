"""Serving: uvicorn on a socket that is open already, until Ctrl-C."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable
from types import FrameType

import uvicorn

from itprune.app.server import make_app
from itprune.app.session import Session
from itprune.app.worker import Worker
from itprune.web.connection import Connection

CONNECTIONS = 256
"""Open at a time; further ones are told that the server is busy."""


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
