"""Front: the requests of a crowd through the real endpoint on loopback, a client for each."""

from __future__ import annotations

import base64
import io
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx

from itprune.checkpoint import Loaded
from itprune.question import Question
from itprune.serving.admission import Admission
from itprune.serving.images import Pictures
from itprune.serving.keys import Keys
from itprune.serving.launching import Server, configure
from itprune.serving.limits import Limits
from itprune.serving.local import LocalBackend
from itprune.serving.server import Endpoint
from itprune.web.listening import address, open_socket

NAME, HOST, METHOD = "bench", "127.0.0.1", "itprune"
LIMITS = Limits(seconds=3600, requests=4096, rate=1_000_000)
EVENT = "data: "


def ask_all(
    loaded: Loaded, keep: float, crowd: Sequence[Question], new_tokens: int, limits: Admission
) -> tuple[float, list[float]]:
    """Asks all questions at the same moment, as streams.

    Args:
        loaded: what answers.
        keep: of all requests.
        crowd: their questions, each one user turn.
        new_tokens: longest answer.
        limits: of the running batch.

    Returns:
        Wall-clock seconds until the last answer ends, and to the first token of each.

    Raises:
        RuntimeError: a request that was refused, or an answer that was broken off.
    """
    bodies = [_body(question, keep, new_tokens) for question in crowd]
    with warnings.catch_warnings():  # dense is asked whether it could be pruned, too
        warnings.simplefilter("ignore")
        backend = LocalBackend(loaded, NAME, METHOD, keep, (), limits)
    everyone = threading.Barrier(len(bodies))
    with _served(backend) as url, ThreadPoolExecutor(len(bodies)) as pool:
        times = list(pool.map(lambda body: _ask(url, body, everyone), bodies))
    start = min(begin for begin, _, _ in times)
    first = [told - begin for begin, told, _ in times]
    return max(end for _, _, end in times) - start, first


@contextmanager
def _served(backend: LocalBackend) -> Iterator[str]:
    """The endpoint's address while the block runs."""
    endpoint = Endpoint(backend, LIMITS, Keys(()), Pictures(LIMITS))
    with open_socket(HOST, 0) as listener:
        server = Server(configure(endpoint, HOST), endpoint)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield address(listener)
        finally:
            server.should_exit = True
            thread.join()


def _ask(url: str, body: dict[str, Any], everyone: threading.Barrier) -> tuple[float, float, float]:
    """When a request was sent, its first token was told, and its answer had ended."""
    with httpx.Client(base_url=url, timeout=LIMITS.seconds) as client:
        client.get("/health").raise_for_status()
        everyone.wait()
        begin = time.perf_counter()
        events = []
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith(EVENT):
                    events.append((time.perf_counter(), line.removeprefix(EVENT)))
    if not events or events[-1][1] != "[DONE]":
        raise RuntimeError(f"a request was not answered: {answer.status_code} {events[-1:]}")
    return begin, events[0][0], events[-1][0]


def _body(question: Question, keep: float, new_tokens: int) -> dict[str, Any]:
    (message,) = question.messages
    pictures = iter(question.images)
    parts = [
        _image(next(pictures)) if part["type"] == "image" else part for part in message["content"]
    ]
    return {
        "model": NAME,
        "messages": [{"role": message["role"], "content": parts}],
        "max_tokens": new_tokens,
        "keep": keep,
        "stream": True,
    }


def _image(picture: Any) -> dict[str, Any]:
    file = io.BytesIO()
    picture.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
