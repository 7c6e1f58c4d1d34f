"""A real server inside the test process, on whatever session and worker a test hands over."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from itprune.app.serving import configure
from itprune.app.session import Session
from itprune.app.worker import Worker

WAIT = 30
"""Seconds after which a test that hangs fails."""


@contextmanager
def served(session: Session, worker: Worker) -> Iterator[str]:
    """Serves on a free port for the block: the address."""
    worker.start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(configure(session, worker, "127.0.0.1"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            worker.close()
            server.should_exit = server.force_exit = True
            thread.join(WAIT)
        assert not thread.is_alive()
