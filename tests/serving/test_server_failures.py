"""What goes wrong on the way, and clients who leave: on a scripted backend."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from itprune.answer import TooLong
from itprune.serving import server
from itprune.serving.backend import Broken, Unavailable
from itprune.serving.openai_errors import sentence_of
from itprune.serving.replies import Reply
from tests.serving.endpoint import CHAT, MODEL, WAIT, body, refusal, served
from tests.serving.scripted import Scripted, said
from tests.serving.under_way import Asking, figure, open_stream, stream_of


@pytest.fixture
def url(backend: Scripted) -> Iterator[str]:
    with served(backend) as (address, _):
        yield address
    assert backend.went == ["started", "closed"]


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


# ----------------------------------------------------------------------------------- sentences
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot read /usr/lib/secret.py now", "cannot read … now"),
        ("'/root/a b.png' and C:\\Users\\me\\x.txt", "'… b.png' and …"),
        ("image/png and/or data:image/png;base64,", "image/png and/or data:image/png;base64,"),
        ("use /v1/models", "use …"),
        ("prune.keep: 0.1 is out of reach", "keep: 0.1 is out of reach"),
        ("", "the server failed on this request; its log says why"),
        ("a\nb", "a"),
        ("x" * 500, "x" * 399 + "…"),
    ],
)
def test_sentences_without_paths(text: str, shown: str) -> None:
    assert sentence_of(ValueError(text)) == shown
