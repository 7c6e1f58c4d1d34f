"""Servers elsewhere answer as the model itself does, the one that has least to do first."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from itprune.answer import TooLong
from itprune.question import Question
from itprune.serving.backend import Broken, Piece, Unavailable
from itprune.serving.encoder import Encoder
from tests.serving.reference import picture, questions
from tests.serving.upstream.asked import BOTH, TOKENS, Asked, said
from tests.serving.upstreams import Servers


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
