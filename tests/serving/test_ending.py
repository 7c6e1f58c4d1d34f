"""Health, and the end: of a server that is told to, and of requests halfway."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator
from queue import Queue
from urllib.parse import urlsplit

import httpx
import pytest

from itprune.serving import server
from itprune.serving.backend import Request
from itprune.serving.course import Course, Gate, Gone
from itprune.serving.metrics import Metrics
from itprune.serving.openai_errors import ApiError
from itprune.serving.replies import Reply
from tests.serving.endpoint import CHAT, WAIT, body, limited, refusal, served
from tests.serving.scripted import Scripted, ScriptedStream, said
from tests.serving.under_way import Asking, figure, open_stream, stream_of, told_to_end


@pytest.fixture
def url(backend: Scripted) -> Iterator[str]:
    with served(backend) as (address, _):
        yield address
    assert backend.went == ["started", "closed"]


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


def test_health_tells_what_is_wrong(url: str, backend: Scripted) -> None:
    backend.sick = "no server is left"
    assert refusal(httpx.get(f"{url}/health"), 503)["message"] == "no server is left"
    backend.sick = ""
    assert httpx.get(f"{url}/health").status_code == 200


def test_gauges_of_the_backend_are_metrics(url: str) -> None:
    assert figure(url, "itprune_waiting") == 3
    assert figure(url, 'itprune_upstream_alive{upstream="a"}') == 1
    assert figure(url, 'itprune_upstream_alive{upstream="b"}') == 0


def until_closed(url: str) -> None:
    for _ in range(10_000):
        if httpx.get(f"{url}/health").status_code == 503:
            return
    raise AssertionError("the gate stays open")


def test_what_is_under_way_is_finished_before_the_end(backend: Scripted) -> None:
    with served(backend) as (url, process):
        whole, streamed = Asking(url), open_stream(url)
        streams = [stream_of(backend), stream_of(backend)]
        for stream in streams:
            backend.tell(stream, said("one "))
        told_to_end(process)
        until_closed(url)
        assert "stopping" in refusal(httpx.get(f"{url}/health"), 503)["message"]
        refused = httpx.post(f"{url}{CHAT}", json=body())
        assert "stopping" in refusal(refused, 503)["message"]
        assert "retry-after" in refused.headers
        for stream in streams:
            backend.tell(stream, said("two", "stop"))
        message = whole.answer().json()["choices"][0]["message"]
        assert message["content"] == "one two"
        text = streamed.getresponse().read().decode()
        assert '"two"' in text
        assert text.endswith("data: [DONE]\n\n")
    assert backend.went == ["started", "closed"]


@pytest.mark.parametrize("twice", [False, True])
def test_what_does_not_end_in_time_is_cut(backend: Scripted, twice: bool) -> None:
    limits = limited(drain_seconds=100.0 if twice else 0.2)
    with served(backend, limits) as (url, process):
        whole, streamed = Asking(url), open_stream(url)
        backend.tell(stream_of(backend), said("one"))
        backend.tell(stream_of(backend), said("one"))
        response = streamed.getresponse()
        told_to_end(process)
        if twice:
            told_to_end(process)
        assert "stopping" in refusal(whole.answer(), 503)["message"]
        last = json.loads(response.read().decode().strip().rpartition("data: ")[2])
        assert "stopping" in last["error"]["message"]
    assert backend.went == ["started", "closed"]
