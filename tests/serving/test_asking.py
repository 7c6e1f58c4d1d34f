"""Servers that say what is no answer."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("httpx", reason="needs pip install 'itprune[serve]'")

import httpx

from itprune.serving import asking
from itprune.serving.asking import Asker, Busy, Event, Refused
from itprune.serving.backend import Broken
from itprune.serving.balance import Gone, Upstream

FIRST = 'data: {"choices": [{"token_ids": [5], "finish_reason": null}]}\n\n'
LAST = 'data: {"choices": [{"token_ids": [6], "finish_reason": "stop"}]}\n\n'


def heard(text: str) -> list[Event]:
    """What is made of a stream."""
    found = []

    async def ask() -> None:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, text=text))
        upstream = Upstream("http://a")
        upstream.alive = True
        async with httpx.AsyncClient(transport=transport) as client:
            async for said in Asker(client)(upstream, "/v1/completions", {}):
                found.append(said)

    asyncio.run(ask())
    return found


@pytest.mark.parametrize(
    "end", [LAST, LAST.replace("\n", "\r\n"), f": a comment\n\n{LAST}", LAST * 2]
)
def test_events(end: str) -> None:
    assert heard(FIRST + end)[:2] == [Event([5], None), Event([6], "stop")]


def test_what_stands_behind_the_end_is_not_read() -> None:
    assert len(heard(f"{FIRST}data: [DONE]\n\ndata: rubbish\n\n")) == 1


@pytest.mark.parametrize("cut", range(1, len(LAST) - 1, 7))
def test_half_an_event_is_none(cut: int) -> None:
    """A proxy may end the stream of a server that died as if all were well."""
    assert heard(FIRST + LAST[:cut]) == [Event([5], None)]


@pytest.mark.parametrize(
    "data",
    [
        "rubbish",
        "[" * 100_000,
        "null",
        "7",
        "{}",
        '{"choices": []}',
        '{"choices": [{"text": "no tokens"}]}',
        '{"choices": [{"token_ids": ["x"]}]}',
        '{"choices": [{"delta": null}]}',
        '{"error": "a word"}',
    ],
    ids=lambda data: data[:20],
)
def test_what_is_no_event_ends_the_answer(data: str) -> None:
    with pytest.raises(Broken, match="dialect"):
        heard(f"{FIRST}data: {data}\n\n{LAST}")


@pytest.mark.parametrize("more", ["x" * 300, "data: x\n" * 200], ids=["line", "event"])
def test_what_never_ends_is_not_read_for_ever(more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "LARGEST", 100)
    with pytest.raises(Broken, match="dialect"):
        heard(f"{FIRST}data: {more}")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ('{"error": {"code": 429, "message": "wait"}}', Busy),
        ('{"error": {"code": 400, "message": "no"}}', Refused),
        ('{"error": {"message": "no"}}', Gone),
        ('{"choices": [{"token_ids": [], "finish_reason": "abort"}]}', Gone),
    ],
)
def test_errors_in_the_middle(data: str, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        heard(f"{FIRST}data: {data}\n\n")
