"""Requests to a scripted endpoint that are under way while a test goes on."""

from __future__ import annotations

import http.client
import json
import threading
from queue import Queue
from typing import Any
from urllib.parse import urlsplit

import httpx

from itprune.serving.launching import Server
from tests.serving.endpoint import CHAT, WAIT, body
from tests.serving.scripted import Scripted, ScriptedStream


class Asking:
    """A request that is under way in a thread of its own."""

    def __init__(self, url: str, key: str = "", **fields: Any) -> None:
        self.answers: Queue[httpx.Response] = Queue()
        headers = {"authorization": f"Bearer {key}"} if key else {}

        def ask() -> None:
            sent = httpx.post(f"{url}{CHAT}", json=body(**fields), headers=headers, timeout=WAIT)
            self.answers.put(sent)

        self.thread = threading.Thread(target=ask, daemon=True)
        self.thread.start()

    def answer(self) -> httpx.Response:
        return self.answers.get(timeout=WAIT)


def stream_of(backend: Scripted) -> ScriptedStream:
    return backend.asked.get(timeout=WAIT)[1]


def open_stream(url: str) -> http.client.HTTPConnection:
    """A streamed request whose answer was not read yet."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=WAIT)
    connection.request(
        "POST", CHAT, json.dumps(body(stream=True)), {"Content-Type": "application/json"}
    )
    return connection


def figure(url: str, name: str) -> float:
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.rsplit(" ", 1)[1])
    return 0.0


def told_to_end(process: Server) -> None:
    """As a signal would."""
    process.handle_exit(15, None)
