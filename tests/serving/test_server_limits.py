"""Keys, pace, and how much and how long: on a scripted backend."""

from __future__ import annotations

import http.client
import json
import socket
import time
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from itprune.serving import launching, server
from itprune.serving.backend import Stream
from itprune.serving.course import Course
from itprune.serving.keys import Keys, Pace, check_keys
from itprune.serving.limits import Limits
from itprune.serving.openai_errors import ApiError
from itprune.serving.requests import READERS, Reader
from tests.serving.endpoint import CHAT, MODEL, WAIT, body, limited, refusal, served
from tests.serving.scripted import Scripted, said
from tests.serving.under_way import Asking, figure, open_stream, stream_of


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
