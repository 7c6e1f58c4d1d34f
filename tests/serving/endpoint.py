"""A real endpoint inside the test process, and requests to it."""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from itprune import load_pretrained
from itprune.serving.admission import Admission
from itprune.serving.backend import Backend
from itprune.serving.images import Pictures
from itprune.serving.keys import Keys
from itprune.serving.launching import Server, configure
from itprune.serving.limits import Limits
from itprune.serving.local import LocalBackend
from itprune.serving.server import Endpoint

MODEL = "tiny"
METHODS = ("itprune", "fastv", "random")
LIMITS = Limits(body_mb=0.2, pixels=200_000, images=3, text=2000, answer=32, rate=100_000)
WAIT = 60
"""Seconds after which a test that hangs fails."""
CHAT = "/v1/chat/completions"


def local(folder: Path, **changes: Any) -> LocalBackend:
    """A backend on a model's folder."""
    given: dict[str, Any] = {
        "name": MODEL,
        "method": "itprune",
        "keep": 0.3,
        "offered": METHODS,
        "limits": Admission(kv_bytes=1 << 30),
    }
    return LocalBackend(load_pretrained(folder), **{**given, **changes})


@contextmanager
def served(
    backend: Backend, limits: Limits = LIMITS, keys: tuple[str, ...] = (), files: Path | None = None
) -> Iterator[tuple[str, Server]]:
    """Serves on a free port for the block: the address and the server."""
    endpoint = Endpoint(backend, limits, Keys(keys), Pictures(limits, files))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(configure(endpoint, "127.0.0.1"), endpoint)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
        finally:
            server.should_exit = True
            thread.join(WAIT)
        assert not thread.is_alive()


def data_url(picture: bytes, kind: str = "image/png") -> str:
    """A picture's file as a URL."""
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"


def image(url: Any) -> dict[str, Any]:
    """A part of a message."""
    return {"type": "image_url", "image_url": {"url": url}}


def asked(*urls: str, text: str = "What digit is red?") -> list[dict[str, Any]]:
    """One user turn: pictures, then a text."""
    return [
        {
            "role": "user",
            "content": [*(image(url) for url in urls), {"type": "text", "text": text}],
        }
    ]


def body(*urls: str, **fields: Any) -> dict[str, Any]:
    """A request."""
    return {"model": MODEL, "messages": asked(*urls), **fields}


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, which is one sentence in OpenAI's shape and tells no secrets."""
    assert response.status_code == status, response.text
    told = response.json()
    assert list(told) == ["error"]
    error = told["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message = error["message"]
    assert message
    assert "\n" not in message
    for secret in ("Traceback", "site-packages", "/tmp", "/root", "/home", "itprune/", ".py"):
        assert secret not in response.text
    return dict(error)


def limited(**changes: Any) -> Limits:
    """`LIMITS` with changes."""
    return replace(LIMITS, **changes)
