"""Requests that end halfway: where the server is told to end at once, and where a client leaves."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from queue import Queue
from urllib.parse import urlsplit

import pytest

from itprune.serving import server
from itprune.serving.backend import Request
from itprune.serving.course import Course, Gate, Gone
from itprune.serving.metrics import Metrics
from itprune.serving.openai_errors import ApiError
from itprune.serving.replies import Reply
from tests.serving.endpoint import CHAT, WAIT, limited, refusal, served
from tests.serving.scripted import Scripted, ScriptedStream, said
from tests.serving.test_server_limits import Asking, told_to_end


@pytest.fixture
def backend() -> Scripted:
    return Scripted()


def test_what_was_not_taken_in_is_cut_too(backend: Scripted) -> None:
    asking = threading.Event()

    async def ask(request: Request) -> ScriptedStream:
        asking.set()
        await asyncio.Event().wait()
        raise AssertionError

    with served(backend, limited(drain_seconds=100.0)) as (url, process):
        backend.ask = ask  # type: ignore[method-assign]
        encoded, sent = Asking(url), http.client.HTTPConnection(urlsplit(url).netloc, timeout=WAIT)
        assert asking.wait(WAIT)
        sent.putrequest("POST", CHAT)
        sent.putheader("Content-Type", "application/json")
        sent.putheader("Content-Length", "1000")
        sent.endheaders()
        while process.endpoint.gate.running < 2:
            pass
        told_to_end(process)
        told_to_end(process)
        assert "stopping" in refusal(encoded.answer(), 503)["message"]
        answer = sent.getresponse()
        assert answer.status == 503
        assert "stopping" in json.load(answer)["error"]["message"]
        sent.close()
    assert backend.went == ["started", "closed"]


def test_an_answer_that_begins_behind_the_cut_is_cut(backend: Scripted) -> None:
    async def begin() -> None:
        gate = Gate()
        gate.cut()
        with pytest.raises(ApiError, match="stopping"):
            async with gate.taking_in():
                await asyncio.Event().wait()
        course = Course(ScriptedStream(Queue()), 0.0, 1e9, gate, Metrics(backend.gauges))
        with pytest.raises(ApiError, match="stopping"):
            await course.next()
        await course.close()

    asyncio.run(begin())


def test_who_leaves_with_the_first_token_gets_a_quiet_end(backend: Scripted) -> None:
    async def read() -> list[str]:
        stream = ScriptedStream(Queue())
        course = Course(stream, 0.0, 1e9, Gate(), Metrics(backend.gauges))
        stream.events.put_nowait(said("one"))
        first = asyncio.create_task(course.next())
        await first
        course.end(Gone())
        events = server._events(course, first, Reply("tiny", "itprune", 0.5), usage=True)
        told = [event async for event in events]
        await course.close()
        return told

    (told,) = asyncio.run(read())
    assert '"one"' in told
