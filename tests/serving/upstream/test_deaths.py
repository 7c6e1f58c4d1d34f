"""Servers that die, fail, hang or contradict themselves take no answer with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from itprune.question import Question
from itprune.serving.backend import Broken, Piece, Unavailable
from itprune.serving.balance import Unreached
from itprune.serving.encoder import Encoder
from itprune.serving.upstream import UpstreamBackend
from tests.serving.reference import picture, questions
from tests.serving.upstream.asked import BOTH, TOKENS, Asked, said, until
from tests.serving.upstreams import Servers


@BOTH
@pytest.mark.parametrize("hold", [0, 1, 7, 19])
def test_a_kill_in_the_middle_of_answers_loses_none(
    servers: Servers, encoder: Encoder, own: list[str], wire: str, hold: int
) -> None:
    """The first server falls silent behind `hold` tokens, and is killed there."""

    async def ask() -> tuple[list[str], UpstreamBackend]:
        first, second = servers.start(hold=hold), servers.start()
        async with Asked(encoder, [first, second], wire) as asked:
            second.freeze()  # so that it ends nothing meanwhile, and both get as many
            streams = [await asked.stream(question) for question in questions() * 2]
            await until(lambda: len(first.log) >= 4)
            second.thaw()
            heads = [[] for _ in streams]
            for stream, head in zip(streams, heads, strict=True):
                if hold:
                    head.append(await anext(aiter(stream)))
            first.kill()
            rests = [[piece async for piece in stream] for stream in streams]
            return [said(a + b) for a, b in zip(heads, rests, strict=True)], asked.backend

    texts, backend = asyncio.run(ask())
    assert texts == own * 2
    assert backend.again >= 4
    assert len([gauge for gauge in backend.gauges() if gauge.name == "upstream_up"]) == 2


def test_the_next_server_is_not_asked_for_what_was_said(servers: Servers, encoder: Encoder) -> None:
    first, second = servers.start(hold=7), servers.start()

    async def ask() -> None:
        async with Asked(encoder, [first, second]) as asked:
            stream = await asked.stream(questions()[1])
            pieces = aiter(stream)
            for _ in range(7):
                await anext(pieces)
            rows = first.log[0]["rows"]
            first.kill()
            _ = [piece async for piece in pieces]
            (again,) = second.log
            assert (again["rows"], again["max_tokens"]) == (rows + 7, TOKENS - 7)

    asyncio.run(ask())


def test_a_server_that_says_otherwise_goes_on_behind_the_text(
    servers: Servers, encoder: Encoder, own: list[str]
) -> None:
    first, second = servers.start(hold=5), servers.start(twist=True)

    async def ask() -> list[Piece]:
        async with Asked(encoder, [first, second], "images") as asked:
            pieces = aiter(await asked.stream(questions()[1]))
            heads = [await anext(pieces) for _ in range(5)]
            first.kill()
            return heads + [piece async for piece in pieces]

    pieces = asyncio.run(ask())
    head = said(pieces[:5])
    assert head
    assert said(pieces).startswith(head)
    assert own[1].startswith(head)
    assert pieces[-1].usage.tokens_out == TOKENS
    assert "continue_final_message" in second.log[-1]["keys"]


def test_a_server_that_does_not_end_an_answer_has_it_ended(
    servers: Servers, encoder: Encoder, own: list[str]
) -> None:
    async def ask() -> list[Piece]:
        async with Asked(encoder, [servers.start(endless=True)]) as asked:
            return await asked.pieces(questions()[1])

    pieces = asyncio.run(asyncio.wait_for(ask(), 60))
    assert said(pieces) == own[1]
    assert pieces[-1].finish == "length"


def test_an_answer_that_fails_is_asked_for_elsewhere(
    servers: Servers, encoder: Encoder, own: list[str]
) -> None:
    ways = [{"cut": 3}, {"status": 500}, {}]

    async def ask() -> list[str]:
        async with Asked(encoder, [servers.start(**way) for way in ways]) as asked:
            return await asyncio.gather(*map(asked.text, questions()))

    assert asyncio.run(ask()) == own


def test_a_request_does_not_end_one_server_after_the_other(
    servers: Servers, encoder: Encoder
) -> None:
    fleet = [servers.start(cut=2) for _ in range(5)]

    async def ask() -> None:
        async with Asked(encoder, fleet) as asked:
            with pytest.raises(Broken, match="several servers ended at work on this request"):
                await asked.text(questions()[1])

    asyncio.run(ask())
    assert sum(len(server.log) for server in fleet) == 3


def test_a_server_that_is_stuck_is_left(servers: Servers, encoder: Encoder, own: list[str]) -> None:
    first, second = servers.start(hold=3), servers.start()

    async def ask() -> str:
        async with Asked(encoder, [first, second], look_seconds=1.0) as asked:
            pieces = aiter(await asked.stream(questions()[1]))
            heads = [await anext(pieces) for _ in range(3)]
            first.freeze()
            return said(heads + [piece async for piece in pieces])

    assert asyncio.run(ask()) == own[1]


def test_a_server_that_only_says_it_lives_is_not_asked_without_pause(
    servers: Servers, encoder: Encoder
) -> None:
    async def ask() -> None:
        calls = 0

        async def refuse(*args: Any) -> AsyncIterator[Any]:
            nonlocal calls
            calls += 1
            raise Unreached("ConnectError")
            yield

        async with Asked(encoder, [servers.start()], beat=0.2) as asked:
            asked.backend._ask = refuse
            stream = await asked.stream(questions()[0])
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.7):
                    await anext(aiter(stream))
            assert 2 <= calls <= 5

    asyncio.run(ask())


def test_images_that_fail_fail_alone(
    servers: Servers, encoder: Encoder, own: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nobody thought of how they fail."""
    whole = encoder.each

    def each(batch: Any, *setting: Any) -> Any:
        if any(one.question.images == bad.images for one in batch):
            raise RuntimeError("/secret/path")
        return whole(batch, *setting)

    bad = Question.from_prompt("What?", [picture(9)])
    monkeypatch.setattr(encoder, "each", each)

    async def ask() -> list[Any]:
        async with Asked(encoder, [servers.start()]) as asked:
            found = map(asked.text, [*questions(), bad, *questions()])
            return await asyncio.gather(*found, return_exceptions=True)

    *texts, failed = sorted(asyncio.run(ask()), key=lambda one: isinstance(one, Exception))
    assert texts == own * 2
    assert isinstance(failed, Broken)
    assert "secret" not in str(failed)


def test_busy_is_not_dead(servers: Servers, encoder: Encoder, own: list[str]) -> None:
    """A server that says nothing for long, and is healthy, is waited for."""
    first = servers.start(hold=3)

    async def ask() -> None:
        async with Asked(encoder, [first, servers.start()], look_seconds=1.0) as asked:
            pieces = aiter(await asked.stream(questions()[1]))
            for _ in range(3):
                await anext(pieces)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await anext(pieces)
            assert asked.backend.again == 0

    asyncio.run(ask())


def test_without_a_server_a_request_is_put_off(servers: Servers, encoder: Encoder) -> None:
    first = servers.start()

    async def ask() -> None:
        async with Asked(encoder, [first]) as asked:
            assert asked.backend.trouble() == ""
            first.kill()
            with pytest.raises(Unavailable, match="no server behind this one answers"):
                await asked.text(questions()[1])
            assert "no server" in asked.backend.trouble()

    asyncio.run(ask())


def test_a_server_that_comes_back_is_asked_again(
    servers: Servers, encoder: Encoder, own: list[str]
) -> None:
    first = servers.start(hold=4)

    async def ask() -> str:
        async with Asked(encoder, [first], patience=30.0) as asked:
            pieces = aiter(await asked.stream(questions()[1]))
            heads = [await anext(pieces) for _ in range(4)]
            first.kill()
            rest = asyncio.create_task(_all(pieces))
            await until(lambda: not asked.backend.balancer.alive)
            servers.start(port=first.port)
            return said(heads + await rest)

    assert asyncio.run(ask()) == own[1]


async def _all(pieces: Any) -> list[Piece]:
    return [piece async for piece in pieces]
