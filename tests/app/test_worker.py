"""The line before the model: places, bounds, visitors who leave, questions that fail."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from queue import Queue

import pytest
import uvicorn
from starlette.testclient import TestClient

from itprune.app.limits import Limits
from itprune.app.server import make_app
from itprune.app.session import Ask, Event, Session, Tell
from itprune.app.streaming import Stopped
from itprune.app.worker import CLOSING, END, FAILED, Full, Job, Worker
from tests.app.asking import answers, connect, events, form, png

WAIT = 30
"""Seconds after which a test that hangs fails."""


class Slow:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.began: Queue[str] = Queue()
        self.go = threading.Semaphore(0)

    def answer(self, ask: Ask, tell: Tell, stopped: Callable[[], bool]) -> None:
        self.began.put(ask.prompt)
        while not self.go.acquire(timeout=0.01):
            if stopped():
                raise Stopped
        if ask.prompt == "bad":
            raise ValueError("a sentence\nand a second line")
        if ask.prompt == "broken":
            raise RuntimeError("/secret/path")
        tell({"kind": "done", "answer": ask.prompt})


class Visitor:
    """Listens to one job."""

    def __init__(self, prompt: str) -> None:
        self.events: Queue[Event] = Queue()
        self.job = Job(Ask(b"", prompt, "itprune", 0.3, 8, False), self.events.put)

    def told(self) -> list[Event]:
        """Everything up to the end."""
        out = []
        while (event := self.events.get(timeout=WAIT)) != END:
            out.append(event)
        return out


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
def worker(slow: Slow) -> Iterator[Worker]:
    worker = Worker(slow, waiting=2)
    worker.start()
    yield worker
    worker.close()


def test_jobs_are_answered_in_turn_and_told_their_place(slow: Slow, worker: Worker) -> None:
    first, second, third = (Visitor(name) for name in "abc")
    worker.join(first.job)
    assert slow.began.get(timeout=WAIT) == "a"
    worker.join(second.job)
    worker.join(third.job)
    slow.go.release(3)
    assert first.told()[-1] == {"kind": "done", "answer": "a"}
    assert next(e["ahead"] for e in second.told() if e["kind"] == "queue") == 1
    places = [e["ahead"] for e in third.told() if e["kind"] == "queue"]
    assert places[0] == 2
    assert places[-1] == 1


def test_the_line_has_an_end(slow: Slow, worker: Worker) -> None:
    visitors = [Visitor(name) for name in "abcd"]
    worker.join(visitors[0].job)
    slow.began.get(timeout=WAIT)
    for visitor in visitors[1:3]:
        worker.join(visitor.job)
    assert worker.full
    with pytest.raises(Full):
        worker.join(visitors[3].job)


def test_who_leaves_the_line_is_not_answered(slow: Slow, worker: Worker) -> None:
    first, second, third = (Visitor(name) for name in "abc")
    worker.join(first.job)
    slow.began.get(timeout=WAIT)
    worker.join(second.job)
    worker.join(third.job)
    worker.leave(second.job)
    slow.go.release(2)
    assert third.told()[-1]["answer"] == "c"
    assert slow.began.get(timeout=WAIT) == "c"


def test_who_leaves_in_the_middle_frees_the_model(slow: Slow, worker: Worker) -> None:
    first, second = Visitor("a"), Visitor("b")
    worker.join(first.job)
    slow.began.get(timeout=WAIT)
    worker.join(second.job)
    worker.leave(first.job)
    assert slow.began.get(timeout=WAIT) == "b"
    slow.go.release()
    assert second.told()[-1]["answer"] == "b"


@pytest.mark.parametrize(("prompt", "error"), [("bad", "a sentence"), ("broken", FAILED)])
def test_a_question_that_fails_stops_nobody(
    slow: Slow, worker: Worker, prompt: str, error: str
) -> None:
    slow.go.release(2)
    first, second = Visitor(prompt), Visitor("b")
    worker.join(first.job)
    assert first.told()[-1] == {"kind": "error", "error": error}
    worker.join(second.job)
    assert second.told()[-1]["answer"] == "b"


def test_closing_tells_everybody(slow: Slow, worker: Worker) -> None:
    first, second = Visitor("a"), Visitor("b")
    worker.join(first.job)
    slow.began.get(timeout=WAIT)
    worker.join(second.job)
    worker.close()
    for visitor in (first, second):
        assert visitor.told()[-1] == {"kind": "error", "error": CLOSING}
    with pytest.raises(Full):
        worker.join(Visitor("c").job)


# -------------------------------------------------------------------------------- on the server
def test_a_full_line_is_a_503_of_one_sentence(session: Session, slow: Slow) -> None:
    worker = Worker(slow, waiting=1)
    worker.start()
    visitors = [Visitor("a"), Visitor("b")]
    worker.join(visitors[0].job)
    slow.began.get(timeout=WAIT)
    worker.join(visitors[1].job)
    with TestClient(make_app(session, worker), "http://127.0.0.1") as client:
        body, headers = form(png())
        response = client.post("/api/ask", content=body, headers=headers)
        assert response.status_code == 503
        assert response.headers["retry-after"]
        assert "too many questions are waiting" in response.json()["error"]
    worker.close()


def test_a_visitor_who_goes_frees_the_model_for_the_next(session: Session, slow: Slow) -> None:
    worker = Worker(slow, waiting=4)
    worker.start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(make_app(session, worker), log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        port = listener.getsockname()[1]
        for prompt in ("first", "second", "third"):  # nobody lets them go on: each leaves instead
            connection = connect(f"http://127.0.0.1:{port}")
            body, headers = form(png(), prompt=prompt)
            connection.request("POST", "/api/ask", body, headers)
            response = connection.getresponse()
            assert slow.began.get(timeout=WAIT) == prompt
            response.close()
            connection.close()
        server.should_exit = True
        thread.join(WAIT)
        assert not thread.is_alive()
    worker.close()


def test_an_answer_that_takes_too_long_is_cut(client: TestClient, session: Session) -> None:
    whole, session.limits = session.limits, Limits(seconds=1e-9)
    try:
        body, headers = form(png())
        told = events(client.post("/api/ask", content=body, headers=headers).text)
    finally:
        session.limits = whole
    done = answers(told)["pruned"]
    assert done["finish"] == "time"
    assert done["tokens_out"] == 1
