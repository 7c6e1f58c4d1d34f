"""The line before the model: places, bounds, visitors who leave, questions that fail."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from starlette.testclient import TestClient

from itprune.app import server, serving
from itprune.app.limits import Limits
from itprune.app.server import make_app
from itprune.app.session import Session
from itprune.app.worker import CLOSING, END, FAILED, Full, Worker
from itprune.web import connection as web_connection
from tests.app.asking import answers, connect, events, form, png
from tests.app.serving import WAIT, served
from tests.app.stubs import Slow, Visitor


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


@pytest.mark.parametrize(
    ("prompt", "error"), [("bad", "a sentence"), ("mute", FAILED), ("broken", FAILED)]
)
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
    with served(session, Worker(slow, waiting=4)) as url:
        for prompt in ("first", "second", "third"):  # nobody lets them go on: each leaves instead
            connection = connect(url)
            body, headers = form(png(), prompt=prompt)
            connection.request("POST", "/api/ask", body, headers)
            response = connection.getresponse()
            assert slow.began.get(timeout=WAIT) == prompt
            response.close()
            connection.close()


def test_who_says_nothing_cannot_hold_all_connections(
    session: Session, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_connection, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(serving, "CONNECTIONS", 4)
    head = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    with served(session, Worker(slow, waiting=4)) as url:
        place = (urlsplit(url).hostname, urlsplit(url).port)
        silent = [socket.create_connection(place, timeout=WAIT) for _ in range(4)]
        silent[1].sendall(head)
        silent[2].sendall(head + b"\r\n" + head)  # an answer, then half a request
        for connection in silent:
            while connection.recv(1 << 16):
                pass
            connection.close()
        own = connect(url)
        own.request("GET", "/")
        assert own.getresponse().status == 200
        own.close()


def test_who_waits_for_an_answer_is_not_cut_off(
    session: Session, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_connection, "HEAD_SECONDS", 0.01)
    monkeypatch.setattr(server, "BEAT", 0.01)
    with served(session, Worker(slow, waiting=4)) as url:
        connection = connect(url)
        body, headers = form(png(), prompt="a")
        connection.request("POST", "/api/ask", body, headers)
        response = connection.getresponse()
        beats = 0
        while beats < 10:
            beats += response.readline().startswith(b": still here")
        slow.go.release()
        assert events(response.read().decode())[-1] == END
        connection.close()


def test_uploads_are_no_more_than_may_wait(session: Session, slow: Slow) -> None:
    body, headers = form(png())
    with served(session, Worker(slow, waiting=1)) as url:
        half, other = connect(url), connect(url)
        half.putrequest("POST", "/api/ask")
        for name, value in {
            **headers,
            "Content-Length": str(len(body)),
            "Expect": "100-continue",
        }.items():
            half.putheader(name, value)
        half.endheaders()
        assert half.sock is not None
        assert half.sock.recv(100).startswith(b"HTTP/1.1 100")  # the server reads
        other.request("POST", "/api/ask", body, headers)
        assert other.getresponse().status == 503
        other.close()
        slow.go.release()
        half.send(body)
        assert b'"end"' in half.getresponse().read()
        half.close()


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
