"""The backend on a model of our own: all methods and families, and what goes wrong."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from itprune import load_pretrained
from itprune.answer import Answerer, TooLong
from itprune.decoding import Decoding
from itprune.question import Question
from itprune.serving.admission import Admission
from itprune.serving.backend import Broken, Piece, Request, Unavailable
from itprune.serving.joining import JoinedLayer
from itprune.serving.local import DEAD, LocalBackend
from tests.app.asking import png
from tests.serving.endpoint import WAIT, local
from tests.tiny_folders import build_folder

TOKENS = 16
PICTURES = tuple(
    Image.open(io.BytesIO(png(size, seed))).convert("RGB")
    for seed, size in enumerate([(96, 96), (140, 70), (60, 90)])
)


def request(picture: int = 0, **changes: Any) -> Request:
    question = Question.from_prompt("What digit is red?", [PICTURES[picture]])
    given = {
        "question": question,
        "max_new_tokens": TOKENS,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 0,
        "stop": (),
        "method": "itprune",
        "keep": 0.3,
    }
    return Request(**{**given, **changes})


async def answer(backend: LocalBackend, request: Request) -> tuple[str, Piece]:
    pieces = [piece async for piece in await backend.ask(request)]
    assert [piece.finish is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    return "".join(piece.text for piece in pieces), pieces[-1]


def running(backend: LocalBackend, work: Callable[[], Awaitable[Any]]) -> Any:
    """Runs something between start and close."""

    async def whole() -> Any:
        await backend.start()
        try:
            async with asyncio.timeout(WAIT):
                return await work()
        finally:
            await backend.close()

    return asyncio.run(whole())


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("llava_next", None),
        ("qwen2_5_vl", ("fastv", "random")),
        ("idefics3", ("fastv",)),
        ("gemma3", ("fastv",)),
        ("paligemma", ("random",)),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_all_methods_at_once_answer_as_infer_does(
    name: str, offered: tuple[str, ...] | None, tmp_path: Path
) -> None:
    folder = build_folder(name, tmp_path)
    backend = local(folder, offered=offered)
    methods = backend.facts().methods
    assert len(methods) > (1 if offered else 10)
    cases = [(method, picture) for method in methods for picture in range(len(PICTURES))]

    async def ask() -> list[tuple[str, Piece]]:
        asked = [answer(backend, request(picture, method=method)) for method, picture in cases]
        return await asyncio.gather(*asked)

    said = running(backend, ask)
    for method in methods:
        loaded = load_pretrained(folder, keep=0.3, method=method)
        answerer = Answerer(loaded, Decoding(max_new_tokens=TOKENS))
        for (other, picture), (text, last) in zip(cases, said, strict=True):
            if other == method:
                wanted = answerer([request(picture).question])[0]
                assert text == wanted.answer, (method, picture)
                assert last.finish == wanted.finish
                assert last.usage.tokens_out == wanted.tokens_out
                assert last.usage.tokens_kept == wanted.tokens_stage1
                assert last.usage.visual_kept == wanted.visual_stage1


def test_methods_that_do_not_fit_are_refused_at_the_start(folder: Path) -> None:
    with pytest.raises(ValueError, match="method 'visionzip' cannot be served: "):
        local(folder, offered=("visionzip",))
    with pytest.raises(ValueError, match=r"method .setok. cannot be served: .*trained parts"):
        local(folder, offered=("setok",))


def test_a_client_who_leaves_gives_up_row_and_memory(folder: Path) -> None:
    backend = local(folder, offered=(), limits=Admission(kv_bytes=1 << 30, rows=1))

    async def leave() -> tuple[str, Piece]:
        long = [await backend.ask(request(max_new_tokens=512)) for _ in range(2)]
        async for piece in long[0]:
            assert piece.finish is None
            if [gauge.value for gauge in backend.gauges()][:2] == [1, 1]:  # waiting, running
                break
        for stream in long:
            await stream.aclose()
            await stream.aclose()
        return await answer(backend, request(1))

    assert running(backend, leave)[1].finish is not None
    assert [gauge.value for gauge in backend.gauges()] == [0, 0, 0]


def test_memory_may_be_asked_for_while_it_is_given_back() -> None:
    class Leaving(JoinedLayer):
        """Its keys and values go while another thread looks at them."""

        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name == "keys" and value is not None:
                self._release()
            return value

    layer = Leaving(None)
    layer.keys, layer.values = torch.zeros(2), torch.zeros(2)
    assert layer.nbytes == 8
    assert layer.nbytes == 0


def test_what_can_never_fit_is_refused_at_once(folder: Path) -> None:
    backend = local(folder, offered=(), limits=Admission(kv_bytes=100_000))

    async def ask() -> None:
        with pytest.raises(ValueError, match="memory for keys and values"):
            await answer(backend, request(max_new_tokens=900))
        words = Question.from_prompt("red " * 2000)
        with pytest.raises(TooLong, match="context holds 1024"):
            await backend.ask(request(question=words))
        await answer(backend, request(max_new_tokens=2))

    running(backend, ask)


def test_a_budget_out_of_reach_is_that_requests_fault(folder: Path) -> None:
    backend = local(folder, offered=("fastv",))

    async def ask() -> None:
        with pytest.raises(ValueError, match="keep"):
            await answer(backend, request(method="fastv", keep=0.02))
        await answer(backend, request(method="fastv", keep=0.6))

    running(backend, ask)


def test_closing_ends_answers_and_takes_no_more(folder: Path) -> None:
    backend = local(folder, offered=())

    async def close() -> None:
        stream = await backend.ask(request(max_new_tokens=900))
        await anext(aiter(stream))
        await backend.close()
        with pytest.raises(Unavailable, match="stopping"):
            async for _ in stream:
                pass
        with pytest.raises(Unavailable, match="stopping"):
            await backend.ask(request())
        assert "stopping" in backend.trouble()

    running(backend, close)
    assert not backend._thread.is_alive()


@pytest.mark.parametrize("what", ["turn", "told"])
def test_a_core_that_breaks_says_so_and_does_not_spin(
    folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    backend = local(folder, offered=())
    turns = []

    def fail(*args: Any) -> None:
        turns.append(1)
        raise RuntimeError("a bug")

    async def ask() -> None:
        await answer(backend, request(max_new_tokens=1))
        if what == "turn":
            monkeypatch.setattr(backend._core, "turn", fail)
        else:
            monkeypatch.setattr("itprune.serving.local._event", fail)
        with pytest.raises(Broken):
            await answer(backend, request())
        assert backend.trouble() == DEAD
        with pytest.raises(Unavailable):
            await backend.ask(request())

    running(backend, ask)
    assert len(turns) == 1
