"""Keys, pace, time, clients who leave, failures on the way, and the end: on a scripted backend."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from queue import Queue
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from itprune.answer import TooLong
from itprune.serving import launching, server
from itprune.serving.backend import Broken, Stream, Unavailable
from itprune.serving.course import Course
from itprune.serving.keys import Keys, Pace, check_keys
from itprune.serving.launching import Server
from itprune.serving.limits import Limits
from itprune.serving.openai_errors import ApiError, sentence_of
from itprune.serving.replies import Reply
from itprune.serving.requests import READERS, Reader
from tests.serving.endpoint import CHAT, MODEL, WAIT, body, limited, refusal, served
from tests.serving.scripted import Scripted, ScriptedStream, said


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


@pytest.fixture
def backend() -> Scripted:
    return Scripted()


@pytest.fixture
def url(backend: Scripted) -> Iterator[str]:
    with served(backend) as (address, _):
        yield address
    assert backend.went == ["started", "closed"]


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


# ------------------------------------------------------------------------------------ failures
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ValueError("a method cannot do this\nTraceback"), 400, "invalid_value"),
        (TooLong("too long"), 400, "context_length_exceeded"),
        (Unavailable("nobody is there"), 503, "unavailable"),
        (Broken("it failed at /usr/lib/python3/secret.py"), 500, "failed"),
    ],
)
def test_what_goes_wrong_before_the_first_token(
    url: str, backend: Scripted, error: Exception, status: int, code: str
) -> None:
    for stream in (False, True):
        asking = Asking(url, stream=stream)
        backend.tell(stream_of(backend), error)
        answer = asking.answer()
        assert refusal(answer, status)["code"] == code
        assert "secret" not in answer.text
        assert ("retry-after" in answer.headers) == (status == 503)
        assert backend.closed.get(timeout=WAIT)
    backend.refuse = error
    assert refusal(Asking(url).answer(), status)["code"] == code


def test_a_bug_of_ours_is_told_of_without_its_traces(url: str, backend: Scripted) -> None:
    backend.refuse = KeyError("/secret/place")
    assert refusal(Asking(url).answer(), 500)["code"] == "failed"
    backend.refuse = None
    asking = Asking(url)
    backend.tell(stream_of(backend), said("a", "stop"))
    assert asking.answer().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("error", [KeyError("/secret/place"), StopAsyncIteration()])
def test_a_backend_that_breaks_its_word_keeps_nobody_waiting(
    url: str, backend: Scripted, error: Exception, stream: bool
) -> None:
    asking = Asking(url, stream=stream)
    backend.tell(stream_of(backend), error)
    assert refusal(asking.answer(), 500)["code"] == "failed"
    assert backend.closed.get(timeout=WAIT)


def test_requests_are_counted_once_by_their_address(
    backend: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> str:
        raise KeyError

    monkeypatch.setattr(Reply, "piece", fail)  # behind the head of an answer
    with served(backend) as (url, _):
        connection = open_stream(url)
        backend.tell(stream_of(backend), said("one"))
        with pytest.raises(http.client.IncompleteRead):
            connection.getresponse().read()
        connection.close()
        for path in ("/v1/models", f"/v1/models/{MODEL}", "/v1/modelsandmore", "/healthy"):
            httpx.get(f"{url}{path}")
        lines = httpx.get(f"{url}/metrics").text.splitlines()
    counted = [line for line in lines if line.startswith("itprune_requests_total")]
    assert sorted(counted) == [
        f'itprune_requests_total{{path="{CHAT}",status="200"}} 1.0',
        'itprune_requests_total{path="/v1/models",status="200"} 2.0',
        'itprune_requests_total{path="other",status="404"} 2.0',
    ]


def test_what_fails_in_the_middle_of_a_stream_is_its_last_event(
    url: str, backend: Scripted
) -> None:
    connection = open_stream(url)
    backend.tell(stream_of(backend), said("one"), Broken("it broke"))
    text = connection.getresponse().read().decode()
    assert '"one"' in text
    last = json.loads(text.strip().rpartition("data: ")[2])
    assert last["error"]["message"] == "it broke"
    assert "[DONE]" not in text
    assert backend.closed.get(timeout=WAIT)


def test_openais_client_raises_what_a_stream_tells(url: str, backend: Scripted) -> None:
    def fail() -> None:
        backend.tell(stream_of(backend), said("one"), Broken("it broke"))

    threading.Thread(target=fail, daemon=True).start()
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "a"}], stream=True, timeout=WAIT
        )
        with pytest.raises(openai.APIError, match="it broke"):
            list(stream)


@pytest.mark.parametrize("well", [True, False])
def test_a_stream_that_waits_in_line_is_not_silent(
    url: str, backend: Scripted, monkeypatch: pytest.MonkeyPatch, well: bool
) -> None:
    monkeypatch.setattr(server, "BEAT", 0.01)
    connection = open_stream(url)
    stream = stream_of(backend)
    answer = connection.getresponse()
    assert [answer.readline() for _ in range(4)] == [b": in line\n", b"\n"] * 2
    backend.tell(stream, said("one", "stop") if well else Unavailable("no memory"))
    rest = answer.read().decode()
    assert ('"one"' in rest, rest.endswith("data: [DONE]\n\n")) == (well, well)
    assert ("no memory" in rest) != well
    assert backend.closed.get(timeout=WAIT)


# --------------------------------------------------------------------------------- who leaves
def test_a_client_gone_in_the_middle_of_a_stream_ends_the_answer(
    url: str, backend: Scripted
) -> None:
    connection = open_stream(url)
    stream = stream_of(backend)
    backend.tell(stream, said("one"))
    response = connection.getresponse()
    assert response.read1(10).startswith(b"data: ")
    response.close()
    connection.close()
    assert backend.closed.get(timeout=WAIT)
    assert figure(url, 'itprune_answers_total{finish="gone"}') == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_gone_before_the_first_token_ends_the_answer(
    url: str, backend: Scripted, stream: bool
) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=WAIT)
    sent = json.dumps(body(stream=stream))
    connection.request("POST", CHAT, sent, {"Content-Type": "application/json"})
    stream_of(backend)
    connection.close()
    assert backend.closed.get(timeout=WAIT)
    assert figure(url, 'itprune_answers_total{finish="gone"}') == 1


def test_a_client_gone_during_its_request_holds_up_nobody(url: str, backend: Scripted) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=WAIT)
    connection.putrequest("POST", CHAT)
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "1000")
    connection.endheaders()
    connection.send(b"{")
    connection.close()
    asking = Asking(url)
    backend.tell(stream_of(backend), said("a", "stop"))
    assert asking.answer().status_code == 200


# ------------------------------------------------------------------------------------- limits
def test_an_answer_that_takes_too_long_is_cut(backend: Scripted) -> None:
    with served(backend, limited(seconds=0.3)) as (url, _):
        asking = Asking(url)
        stream_of(backend)
        assert "in time" in refusal(asking.answer(), 503)["message"]
        asking = Asking(url)
        backend.tell(stream_of(backend), said("half of"))
        (choice,) = asking.answer().json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("half of", "length")
        assert figure(url, 'itprune_answers_total{finish="time"}') == 1
        assert backend.closed.qsize() == 2


def test_a_request_that_takes_too_long_to_come_in(backend: Scripted) -> None:
    with served(backend, limited(upload_seconds=0.2)) as (url, _):
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=WAIT)
        connection.putrequest("POST", CHAT)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "1000")
        connection.endheaders()
        connection.send(b"{")
        answer = connection.getresponse()
        assert answer.status == 408
        assert "too long to come in" in json.load(answer)["error"]["message"]
        connection.close()


def test_slow_senders_of_one_client_hold_up_no_other(backend: Scripted) -> None:
    keys = ("the-key-of-one", "the-key-of-two")
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: 99\r\nAuthorization: Bearer {keys[0]}\r\n\r\n{{"
    limits = limited(upload_seconds=2.0 * WAIT)
    with served(backend, limits, keys) as (url, process), ExitStack() as stack:
        port = urlsplit(url).port
        for _ in range(READERS + 1):
            sender = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            sender.sendall(head.encode())
        while process.endpoint.gate.running <= READERS:
            pass
        asking = Asking(url, key=keys[1])
        backend.tell(stream_of(backend), said("a", "stop"))
        assert asking.answer().status_code == 200


def test_a_client_who_does_not_read_is_cut_off(backend: Scripted) -> None:
    with served(backend, limited(seconds=0.5)) as (url, _):
        connection = open_stream(url)
        backend.tell(stream_of(backend), *[said("a" * 1_000_000)] * 30, said("", "stop"))
        assert backend.closed.get(timeout=WAIT)
        answer = connection.getresponse()
        with pytest.raises(http.client.IncompleteRead):
            answer.read()
        connection.close()


def test_more_than_may_be_under_way(backend: Scripted) -> None:
    with served(backend, limited(requests=1)) as (url, _):
        asking = Asking(url)
        stream = stream_of(backend)
        answer = httpx.post(f"{url}{CHAT}", json=body())
        assert "too many requests" in refusal(answer, 503)["message"]
        assert answer.headers["retry-after"] == "5"
        backend.tell(stream, said("a", "stop"))
        assert asking.answer().status_code == 200


def test_more_connections_than_may_be_open(
    backend: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "CONNECTIONS", 1)
    with served(backend) as (url, _), httpx.Client(base_url=url) as first:
        assert first.get("/health").status_code == 200
        answer = httpx.get(f"{url}/health")
        assert "too many connections" in refusal(answer, 503)["message"]
        assert (answer.headers["retry-after"], answer.headers["connection"]) == ("5", "close")
        assert first.get("/health").status_code == 200


def test_time_runs_from_the_last_byte(backend: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    read, times = Reader._read, []

    def noted(*args: Any) -> Any:
        times.append(time.monotonic())
        return read(*args)

    def begun(stream: Stream, began: float, *args: Any) -> Course:
        times.append(began)
        return Course(stream, began, *args)

    monkeypatch.setattr(Reader, "_read", noted)
    monkeypatch.setattr(server, "Course", begun)
    with served(backend) as (url, _):
        asking = Asking(url)
        backend.tell(stream_of(backend), said("a", "stop"))
        assert asking.answer().status_code == 200
    reading, began = times
    assert began <= reading


def test_a_refusal_is_heard_by_who_sends_all_before_listening(backend: Scripted) -> None:
    large = b" " * 15_000_000
    with served(backend, limited(body_mb=16), keys=("a-long-secret",)) as (url, _):
        for key, status in (("wrong", 401), ("a-long-secret", 415)):
            connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=WAIT)
            connection.request("POST", CHAT, large, {"Authorization": f"Bearer {key}"})
            assert connection.getresponse().status == status
            connection.close()


def test_each_client_has_its_own_pace() -> None:
    clock = [0.0]
    pace = Pace(2, lambda: clock[0])
    pace.take("a")
    pace.take("a")
    with pytest.raises(ApiError, match="2 requests a minute") as error:
        pace.take("a")
    assert (error.value.status, error.value.wait) == (429, 30)
    pace.take("b")
    clock[0] = 30.0
    pace.take("a")
    with pytest.raises(ApiError):
        pace.take("a")


def test_who_asks_again_when_told_is_answered() -> None:
    clock = [0.0]
    pace = Pace(40, lambda: clock[0])
    for _ in range(40):
        pace.take("a")
    clock[0] = 0.2
    with pytest.raises(ApiError) as error:
        pace.take("a")
    assert error.value.wait is not None
    clock[0] += error.value.wait
    pace.take("a")


def test_who_asks_too_often_is_told_when_to_ask_again(backend: Scripted) -> None:
    with served(backend, limited(rate=1)) as (url, _):
        asking = Asking(url)
        backend.tell(stream_of(backend), said("a", "stop"))
        assert asking.answer().status_code == 200
        answer = httpx.post(f"{url}{CHAT}", json=body())
        assert refusal(answer, 429)["type"] == "rate_limit_error"
        assert int(answer.headers["retry-after"]) > 0
        assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.parametrize(
    "changes", [{"pixels": 0}, {"seconds": float("inf")}, {"keep_min": 0.5, "keep_max": 0.4}]
)
def test_limits_that_let_nothing_through(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Limits(**changes)


# --------------------------------------------------------------------------------------- keys
def test_a_key_is_needed_for_all_but_health(backend: Scripted) -> None:
    keys = ("first-secret", "second-secret")
    with served(backend, keys=keys) as (url, _):
        assert httpx.get(f"{url}/health").status_code == 200
        for headers in (
            {},
            {"authorization": "Bearer"},
            {"authorization": "Bearer first-secre"},
            {"authorization": "Basic first-secret"},
            {"authorization": "Bearer first-secret second-secret"},
            {"authorization": b"Bearer \xff\xfe"},
        ):
            for method, path in (
                ("POST", CHAT),
                ("GET", "/v1/models"),
                ("GET", f"/v1/models/{MODEL}"),
                ("GET", "/metrics"),
            ):
                answer = httpx.request(method, f"{url}{path}", headers=headers)
                assert refusal(answer, 401)["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        for key in keys:
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key) as client:
                assert client.models.list().data[0].id == MODEL
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_short_keys_are_refused() -> None:
    check_keys(("first-secret", "8letters"))
    with pytest.raises(ValueError, match="at least 8"):
        check_keys(("first-secret", "7letter"))
    assert Keys()._digests == ()


# ------------------------------------------------------------------------------- health, the end
def test_health_tells_what_is_wrong(url: str, backend: Scripted) -> None:
    backend.sick = "no server is left"
    assert refusal(httpx.get(f"{url}/health"), 503)["message"] == "no server is left"
    backend.sick = ""
    assert httpx.get(f"{url}/health").status_code == 200


def test_gauges_of_the_backend_are_metrics(url: str) -> None:
    assert figure(url, "itprune_waiting") == 3
    assert figure(url, 'itprune_upstream_alive{upstream="a"}') == 1
    assert figure(url, 'itprune_upstream_alive{upstream="b"}') == 0


def told_to_end(process: Server) -> None:
    """As a signal would."""
    process.handle_exit(15, None)


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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot read /usr/lib/secret.py now", "cannot read … now"),
        ("'/root/a b.png' and C:\\Users\\me\\x.txt", "'… b.png' and …"),
        ("image/png and/or data:image/png;base64,", "image/png and/or data:image/png;base64,"),
        ("use /v1/models", "use …"),
        ("", "the server failed on this request; its log says why"),
        ("a\nb", "a"),
        ("x" * 500, "x" * 399 + "…"),
    ],
)
def test_sentences_without_paths(text: str, shown: str) -> None:
    assert sentence_of(ValueError(text)) == shown
