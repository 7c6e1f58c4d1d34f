"""Servers that die while others wait for them."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("httpx", reason="needs pip install 'itprune[serve]'")

import httpx

from itprune.serving.balance import Balancer, Gone, Unreached, Upstream


def test_whoever_waits_for_a_server_is_told_of_its_end_once() -> None:
    async def wait() -> None:
        upstream = Upstream("http://a")
        upstream.alive = True
        waits = [
            asyncio.create_task(upstream.unless_gone(asyncio.Event().wait())) for _ in range(3)
        ]
        await asyncio.sleep(0)
        upstream.bury()
        upstream.bury()  # several find it dead at once
        found = await asyncio.gather(*waits, return_exceptions=True)
        assert [type(one) for one in found] == [Gone] * 3

    asyncio.run(wait())


def test_nobody_begins_to_wait_for_a_dead_server() -> None:
    async def wait() -> None:
        with pytest.raises(Gone):
            await Upstream("http://a").unless_gone(asyncio.Event().wait())

    asyncio.run(wait())


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (httpx.ConnectError("refused"), Unreached),
        (httpx.ReadError("reset"), Gone),
        (httpx.RemoteProtocolError("closed"), Gone),
    ],
)
def test_a_connection_that_fails(error: httpx.TransportError, kind: type[Gone]) -> None:
    async def fail() -> None:
        raise error

    async def wait() -> None:
        upstream = Upstream("http://a")
        upstream.alive = True
        with pytest.raises(Gone) as told:
            await upstream.unless_gone(fail())
        assert type(told.value) is kind

    asyncio.run(wait())


def test_a_cancelled_request_is_no_death() -> None:
    async def wait() -> None:
        upstream = Upstream("http://a")
        upstream.alive = True
        work = asyncio.create_task(upstream.unless_gone(asyncio.Event().wait()))
        await asyncio.sleep(0)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(wait())


def test_many_that_doubt_a_server_look_once() -> None:
    looks = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal looks
        looks += 1
        return httpx.Response(503)

    async def doubt() -> None:
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport) as client:
            balancer = Balancer(["http://a"], client)
            (upstream,) = balancer.upstreams
            upstream.alive = True
            await asyncio.gather(*(balancer.doubt(upstream) for _ in range(5)))
            assert not upstream.alive

    asyncio.run(doubt())
    assert looks == 1


@pytest.mark.parametrize(
    "models",
    [
        "",
        "{}",
        '{"data": []}',
        '{"data": [{"id": 1, "max_model_len": "x"}]}',
        '{"data": [{"id": 1, "max_model_len": 1e999}]}',
        '{"data": [{"id": 1, "max_model_len": 0}]}',
        "[" * 100_000,
    ],
    ids=["nothing", "empty", "none", "word", "endless", "zero", "deep"],
)
def test_a_server_that_names_no_model_is_left_out(models: str) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text=models)

    async def start() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            balancer = Balancer(["http://a"], client)
            await balancer.start()
            assert not balancer.alive
            async with balancer.lend() as upstream:
                assert upstream is None
            await balancer.close()

    asyncio.run(start())


def test_another_model_at_the_same_address_is_noticed() -> None:
    cards = [{"id": "a", "max_model_len": 50}, {"id": "b", "max_model_len": 9}]

    def answer(request: httpx.Request) -> httpx.Response:
        models = request.url.path == "/v1/models"
        return httpx.Response(200, json={"data": [cards.pop(0)]} if models else {})

    async def look() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            balancer = Balancer(["http://a"], client, beat=0.01)
            (upstream,) = balancer.upstreams
            await balancer.start()
            assert (upstream.model, upstream.context, upstream.alive) == ("a", 50, True)
            while cards:
                await asyncio.sleep(0.01)
            assert (upstream.model, upstream.context) == ("b", 9)
            await balancer.close()

    asyncio.run(look())


def test_why_a_server_is_left_out_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    looks = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal looks
        looks += 1
        return httpx.Response(401 if request.url.path == "/v1/models" else 200)

    async def look() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            balancer = Balancer(["http://a"], client, beat=0.01)
            await balancer.start()
            while looks < 6:
                await asyncio.sleep(0.01)
            assert not balancer.alive
            await balancer.close()

    asyncio.run(look())
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == ["http://a is left out until it answers: it does not accept the key"]
