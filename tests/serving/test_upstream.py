"""Servers elsewhere answer as the model itself does, also where some of them die meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs pip install 'itprune[serve]'")
pytest.importorskip("httpx", reason="needs pip install 'itprune[serve]'")

from itprune.answer import TooLong
from itprune.question import Question
from itprune.serving.backend import Broken, Piece, Request, Unavailable
from itprune.serving.balance import Unreached
from itprune.serving.encoder import Encoder
from itprune.serving.upstream import UpstreamBackend
from itprune.serving.wire import WIRES
from tests.serving.reference import Reference, picture, questions
from tests.serving.upstreams import Server, Servers, build_wide
from tests.tiny_llava import PLAIN

KEEP = 0.5
TOKENS = 20
BOTH = pytest.mark.parametrize("wire", list(WIRES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wide(tmp_path_factory.mktemp("wide"), PLAIN)


@pytest.fixture(scope="module")
def forge(folder: Path) -> Iterator[Servers]:
    servers = Servers(folder)
    yield servers
    servers.close()


@pytest.fixture
def servers(forge: Servers) -> Iterator[Servers]:
    yield forge
    forge.end_all()


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder.load(folder, keep=KEEP, device="cpu")


@pytest.fixture(scope="module")
def own(folder: Path) -> list[str]:
    """What the model itself says to `questions`."""
    reference = Reference(folder, KEEP)
    return [reference.answer(question, TOKENS).answer for question in questions()]


class Asked:
    """A backend, started for the block, and answers from it."""

    def __init__(
        self, encoder: Encoder, servers: Sequence[Server], wire: str = "prompt", **more: Any
    ) -> None:
        given = {"beat": 0.05, "patience": 0.0, **more}
        urls = [server.url for server in servers]
        self.backend = UpstreamBackend(encoder, WIRES[wire](encoder), urls, "tiny", **given)

    async def __aenter__(self) -> Asked:
        await self.backend.start()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.backend.close()

    async def pieces(self, question: Question, **changes: Any) -> list[Piece]:
        return [piece async for piece in await self.stream(question, **changes)]

    async def stream(self, question: Question, **changes: Any) -> Any:
        return await self.backend.ask(replace(request(question), **changes))

    async def text(self, question: Question, **changes: Any) -> str:
        return said(await self.pieces(question, **changes))


def request(question: Question) -> Request:
    return Request(question, TOKENS, 0.0, 1.0, 0, (), "itprune", KEEP)


def said(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


# ------------------------------------------------------------------------------------ answers
@BOTH
def test_answers_are_those_of_the_model_itself(
    servers: Servers, encoder: Encoder, own: list[str], wire: str
) -> None:
    async def ask() -> list[list[Piece]]:
        async with Asked(encoder, [servers.start(), servers.start()], wire) as asked:
            return await asyncio.gather(*map(asked.pieces, questions() * 6))

    for pieces, wanted in zip(asyncio.run(ask()), own * 6, strict=True):
        assert said(pieces) == wanted
        assert [piece.finish for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
        assert pieces[-1].usage.tokens_out == TOKENS


def test_usage_tells_what_stayed(servers: Servers, encoder: Encoder) -> None:
    async def ask() -> list[Piece]:
        async with Asked(encoder, [servers.start()]) as asked:
            return await asked.pieces(questions()[2])

    usage = asyncio.run(ask())[-1].usage
    (asked,) = [servers._started[0].log]
    assert (usage.visual_in, usage.tokens_in - usage.visual_in) == (
        32,
        usage.tokens_kept - usage.visual_kept,
    )
    assert asked[0]["rows"] == usage.tokens_kept < usage.tokens_in


def test_what_is_asked_for_differs_from_request_to_request(
    servers: Servers, encoder: Encoder
) -> None:
    async def ask() -> list[int]:
        async with Asked(encoder, [servers.start()], names=["topk_cls"]) as asked:
            assert set(asked.backend.facts().methods) == {"itprune", "topk_cls"}
            question = questions()[1]
            settings = [("topk_cls", 0.25), ("itprune", 1.0), ("topk_cls", 0.5)] * 3
            found = [asked.pieces(question, method=m, keep=k) for m, k in settings]
            return [pieces[-1].usage.visual_kept for pieces in await asyncio.gather(*found)]

    assert asyncio.run(ask()) == [4, 16, 8] * 3


@BOTH
def test_stop_strings_end_an_answer(
    servers: Servers, encoder: Encoder, own: list[str], wire: str
) -> None:
    stop = own[1][5:8]

    async def ask() -> list[Piece]:
        async with Asked(encoder, [servers.start()], wire) as asked:
            return await asked.pieces(questions()[1], stop=(stop,))

    pieces = asyncio.run(ask())
    assert said(pieces) == own[1].partition(stop)[0].strip()
    assert pieces[-1].finish == "stop"


def test_what_was_typed_is_no_image_place(servers: Servers, encoder: Encoder) -> None:
    typed = {"role": "user", "content": [{"type": "text", "text": "What is <image> here?"}]}

    async def ask() -> list[Piece]:
        async with Asked(encoder, [servers.start()]) as asked:
            return await asked.pieces(Question((typed,)))

    assert asyncio.run(ask())[-1].usage.visual_in == 0


def test_a_seed_draws_the_same_again(servers: Servers, encoder: Encoder) -> None:
    async def ask() -> list[str]:
        async with Asked(encoder, [servers.start(), servers.start()]) as asked:
            draws = [{"temperature": 1.0, "seed": seed} for seed in (1, 1, 2)]
            return [await asked.text(questions()[1], **draw) for draw in draws]

    first, again, other = asyncio.run(ask())
    assert first == again != other


# ------------------------------------------------------------------------------------ deaths
@BOTH
@pytest.mark.parametrize("hold", [0, 1, 7, 19])
def test_a_kill_in_the_middle_of_answers_loses_none(
    servers: Servers, encoder: Encoder, own: list[str], wire: str, hold: int
) -> None:
    """The first server falls silent behind `hold` tokens, and is killed there."""

    async def ask() -> tuple[list[str], UpstreamBackend]:
        first, second = servers.start(hold=hold), servers.start()
        async with Asked(encoder, [first, second], wire) as asked:
            streams = [await asked.stream(question) for question in questions() * 2]
            heads = [[] for _ in streams]
            for stream, head in zip(streams, heads, strict=True):
                if hold:
                    head.append(await anext(aiter(stream)))
            await until(lambda: len(first.log) >= 4)
            first.kill()
            rests = [[piece async for piece in stream] for stream in streams]
            return [said(a + b) for a, b in zip(heads, rests, strict=True)], asked.backend

    texts, backend = asyncio.run(ask())
    assert texts == own * 2
    assert backend.again >= 4
    assert len([gauge for gauge in backend.gauges() if gauge.name == "upstream_up"]) == 2


async def until(true: Any) -> None:
    """Waits for something that another process does."""
    async with asyncio.timeout(30):
        while not await asyncio.to_thread(true):
            pass


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


# ------------------------------------------------------------------------------------ balance
def test_who_has_least_under_way_is_asked(servers: Servers, encoder: Encoder) -> None:
    fleet = [servers.start(hold=1) for _ in range(3)]

    async def ask() -> list[int]:
        async with Asked(encoder, fleet) as asked:
            streams = [await asked.stream(question) for question in questions()[:3] * 3]
            for stream in streams:
                await anext(aiter(stream))
            shares = [one.under_way for one in asked.backend.balancer.upstreams]
            for stream in streams:
                await stream.aclose()
            assert [one.under_way for one in asked.backend.balancer.upstreams] == [0, 0, 0]
            return shares

    assert asyncio.run(ask()) == [3, 3, 3]


def test_a_busy_server_sends_on_to_the_next(
    servers: Servers, encoder: Encoder, own: list[str]
) -> None:
    fleet = [servers.start(status=429), servers.start()]

    async def ask() -> list[str]:
        async with Asked(encoder, fleet) as asked:
            return await asyncio.gather(*map(asked.text, questions()))

    assert asyncio.run(ask()) == own


def test_all_are_busy(servers: Servers, encoder: Encoder) -> None:
    async def ask() -> None:
        async with Asked(encoder, [servers.start(status=503) for _ in range(2)]) as asked:
            with pytest.raises(Unavailable, match="all servers behind this one are busy"):
                await asked.text(questions()[1])

    asyncio.run(ask())


def test_a_sick_server_is_not_asked(servers: Servers, encoder: Encoder, own: list[str]) -> None:
    sick, well = servers.start(health=503), servers.start()

    async def ask() -> str:
        async with Asked(encoder, [sick, well]) as asked:
            return await asked.text(questions()[1])

    assert asyncio.run(ask()) == own[1]
    assert sick.log == []


@pytest.mark.parametrize("wire", ["images"])
def test_a_stock_server_lives_where_all_images_have_one_count(
    servers: Servers, folder: Path, encoder: Encoder, wire: str
) -> None:
    """It dies of unlike ones."""
    pictures = [Question.from_prompt("What?", [picture(seed)]) for seed in range(8)]
    alike = Encoder.load(folder, same_count=6, device="cpu")

    async def ask(encoder: Encoder) -> bool:
        server = servers.start(ragged=False)
        async with Asked(encoder, [server], wire) as asked:
            setting = {"method": encoder.method, "keep": encoder.usual_keep}
            found = [asked.text(question, **setting) for question in pictures]
            texts = await asyncio.gather(*found, return_exceptions=True)
            return all(isinstance(text, str) for text in texts)

    assert asyncio.run(ask(alike))
    assert not asyncio.run(ask(encoder))


# ------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("way", "kind", "sentence"),
    [
        ({"status": 400, "message": "Bad thing. Look"}, ValueError, "this request: Bad thing$"),
        ({"status": 400, "message": "You must set `--enable-prompt-embeds` to"}, Broken, "started"),
        ({"status": 404}, Broken, "dialect"),
        ({"status": 302}, Broken, "dialect"),
        ({"key": "secret"}, Broken, "do not accept its key"),
    ],
)
def test_refusals_are_one_sentence(
    servers: Servers, encoder: Encoder, way: dict[str, Any], kind: type[Exception], sentence: str
) -> None:
    async def ask() -> None:
        async with Asked(encoder, [servers.start(**way)]) as asked:
            with pytest.raises(kind, match=sentence):
                await asked.text(questions()[1])

    asyncio.run(ask())


def test_the_key_is_sent(servers: Servers, encoder: Encoder, own: list[str]) -> None:
    async def ask() -> str:
        async with Asked(encoder, [servers.start(key="secret")], key="secret") as asked:
            return await asked.text(questions()[1])

    assert asyncio.run(ask()) == own[1]


def test_the_context_is_that_of_the_smallest_server(servers: Servers, encoder: Encoder) -> None:
    async def ask() -> list[Piece]:
        async with Asked(encoder, [servers.start(context=30), servers.start()]) as asked:
            assert asked.backend.facts().context == 30
            with pytest.raises(TooLong, match=r"tokens that stay, but the context .* holds 30"):
                await asked.text(questions()[2], keep=1.0)
            return await asked.pieces(questions()[1])

    last = asyncio.run(ask())[-1]
    assert last.finish == "length"
    assert last.usage.tokens_kept + last.usage.tokens_out == 30


def test_a_budget_or_method_that_cannot_be_had(servers: Servers, encoder: Encoder) -> None:
    async def ask() -> None:
        async with Asked(encoder, [servers.start()]) as asked:
            with pytest.raises(ValueError, match="works inside the language model"):
                await asked.text(questions()[1], method="fastv")
            with pytest.raises(ValueError, match="keep"):
                await asked.text(questions()[1], keep=0.0)

    asyncio.run(ask())


def test_a_client_that_leaves_frees_the_server(servers: Servers, encoder: Encoder) -> None:
    async def ask() -> None:
        async with Asked(encoder, [servers.start(hold=2)]) as asked:
            stream = await asked.stream(questions()[1])
            await anext(aiter(stream))
            (upstream,) = asked.backend.balancer.upstreams
            assert upstream.under_way == 1
            await stream.aclose()
            assert upstream.under_way == 0
            await stream.aclose()
            unread = await asked.stream(questions()[1])
            await unread.aclose()
            assert upstream.under_way == 0

    asyncio.run(ask())
