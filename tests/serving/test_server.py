"""The endpoint as OpenAI's own client uses it: answers are those of `itprune infer`."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from itprune import load_pretrained
from itprune.answer import Answerer
from itprune.decoding import Decoding
from itprune.question import Question
from tests.app.asking import png
from tests.serving.endpoint import CHAT, MODEL, WAIT, asked, body, data_url, image

PICTURES = [png(size, seed) for size in ((96, 96), (140, 70), (60, 90)) for seed in (0, 4)]
TEXT = "What digit is red?"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=WAIT) as client:
        yield client


Expected = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def expected(folder: Path) -> Expected:
    """What `itprune infer` answers."""

    def answer(
        question: Question, keep: float, method: str = "itprune", **decoding: Any
    ) -> dict[str, Any]:
        loaded = load_pretrained(folder, keep=keep, method=method)
        answerer = Answerer(loaded, Decoding(**{"max_new_tokens": 32, **decoding}))
        return answerer([question])[0].to_dict()

    return answer


def shown(*pictures: bytes, text: str = TEXT) -> Question:
    return Question.from_prompt(text, [opened(picture) for picture in pictures])


def opened(picture: bytes) -> Image.Image:
    return Image.open(io.BytesIO(picture)).convert("RGB")


def create(client: openai.OpenAI, messages: Any, **fields: Any) -> Any:
    extra = {name: fields.pop(name) for name in ("keep", "method") if name in fields}
    return client.chat.completions.create(
        model=MODEL, messages=messages, extra_body=extra, **fields
    )


# ------------------------------------------------------------------------------------- answers
@pytest.mark.parametrize(
    ("method", "keep"), [("itprune", 0.3), ("itprune", 1.0), ("fastv", 0.3), ("random", 0.5)]
)
def test_an_answer_is_that_of_infer(
    client: openai.OpenAI, expected: Expected, method: str, keep: float
) -> None:
    for picture in PICTURES[:3]:
        answer = create(client, asked(data_url(picture)), method=method, keep=keep)
        wanted = expected(shown(picture), keep, method)
        (choice,) = answer.choices
        assert choice.message.content == wanted["answer"]
        assert choice.message.role == "assistant"
        assert choice.finish_reason == wanted["finish"]
        assert answer.usage.prompt_tokens == wanted["tokens_in"]
        assert answer.usage.completion_tokens == wanted["tokens_out"]
        assert answer.usage.total_tokens == wanted["tokens_in"] + wanted["tokens_out"]
        assert answer.itprune == {
            "method": method,
            "keep": keep,
            "kept_tokens": wanted["tokens_stage1"],
            "visual_tokens": wanted["visual_in"],
            "kept_visual_tokens": wanted["visual_stage1"],
        }
        assert answer.model == MODEL
        assert answer.object == "chat.completion"


def test_a_stream_says_the_same_piece_by_piece(client: openai.OpenAI) -> None:
    messages = asked(data_url(PICTURES[0]), text="Look at all the digits. What digit is red?")
    whole = create(client, messages, max_tokens=20, temperature=1.5, seed=7)
    stream = create(
        client,
        messages,
        max_tokens=20,
        temperature=1.5,
        seed=7,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    ends = [chunk.choices[0].finish_reason for chunk in chunks]
    assert ends == [None] * (len(ends) - 1) + [whole.choices[0].finish_reason]
    assert last.choices == []
    assert last.usage == whole.usage
    assert last.itprune == whole.itprune
    assert len({chunk.id for chunk in (*chunks, last)}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_a_stream_without_usage_ends_with_its_reason(client: openai.OpenAI) -> None:
    chunks = list(create(client, asked(data_url(PICTURES[0])), stream=True))
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert all(chunk.usage is None for chunk in chunks)


def test_defaults_are_greedy_and_the_servers_own(client: openai.OpenAI, expected: Expected) -> None:
    answer = create(client, asked(data_url(PICTURES[1])))
    assert answer.choices[0].message.content == expected(shown(PICTURES[1]), 0.3)["answer"]
    assert (answer.itprune["method"], answer.itprune["keep"]) == ("itprune", 0.3)


def test_what_is_drawn_follows_from_the_seed(client: openai.OpenAI, expected: Expected) -> None:
    def draw(seed: int) -> str:
        answer = create(
            client,
            asked(data_url(PICTURES[0])),
            temperature=2.0,
            top_p=0.99,
            seed=seed,
            max_completion_tokens=8,
        )
        return answer.choices[0].message.content

    wanted = expected(
        shown(PICTURES[0]), 0.3, temperature=2.0, top_p=0.99, seed=3, max_new_tokens=8
    )
    assert draw(3) == draw(3) == wanted["answer"]
    assert len({draw(seed) for seed in range(4)}) > 1


def test_answers_are_cut_where_asked(client: openai.OpenAI) -> None:
    messages = asked(data_url(PICTURES[0]))
    long = create(client, messages, temperature=2.0, seed=1, max_tokens=12)
    text = long.choices[0].message.content
    short = create(client, messages, temperature=2.0, seed=1, max_tokens=2)
    assert short.usage.completion_tokens == 2
    assert short.choices[0].finish_reason == "length"
    assert text.startswith(short.choices[0].message.content)
    stop = text[len(text) // 2 :][:2]
    ended = create(client, messages, temperature=2.0, seed=1, max_tokens=12, stop=[stop, "\0"])
    assert ended.choices[0].message.content == text.partition(stop)[0].rstrip()
    assert ended.choices[0].finish_reason == "stop"


def test_dialogues_several_pictures_and_text_alone(
    client: openai.OpenAI, expected: Expected
) -> None:
    first, second = PICTURES[0], PICTURES[3]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [image(data_url(first)), {"type": "text", "text": TEXT}]},
        {"role": "assistant", "content": "4"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "And here?"}, image(data_url(second))],
        },
    ]
    question = Question(
        (
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TEXT}]},
            {"role": "assistant", "content": [{"type": "text", "text": "4"}]},
            {"role": "user", "content": [{"type": "text", "text": "And here?"}, {"type": "image"}]},
        ),
        (opened(first), opened(second)),
    )
    answer = create(client, messages)
    wanted = expected(question, 0.3)
    assert answer.choices[0].message.content == wanted["answer"]
    assert answer.usage.prompt_tokens == wanted["tokens_in"]
    alone = create(client, [{"role": "user", "content": "What digit?"}])
    assert alone.choices[0].message.content == expected(shown(text="What digit?"), 0.3)["answer"]
    assert alone.itprune["visual_tokens"] == 0


def test_what_stands_for_an_image_is_text_where_a_client_types_it(client: openai.OpenAI) -> None:
    costs = [
        create(client, asked(data_url(PICTURES[0]), text=text), max_tokens=1).itprune
        for text in ("What does it mean?", "What does <image> mean?")
    ]
    assert costs[0]["visual_tokens"] == costs[1]["visual_tokens"] > 0


def test_many_at_once_get_what_each_would_alone(client: openai.OpenAI) -> None:
    settings = [("itprune", 0.3), ("itprune", 1.0), ("fastv", 0.5), ("random", 0.4)]
    cases = list(itertools.product(PICTURES, settings))

    def ask(case: tuple[bytes, tuple[str, float]]) -> tuple[str, int]:
        picture, (method, keep) = case
        answer = create(client, asked(data_url(picture)), method=method, keep=keep)
        return answer.choices[0].message.content, answer.itprune["kept_tokens"]

    alone = [ask(case) for case in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        assert list(pool.map(ask, cases)) == alone


def test_who_leaves_disturbs_nobody_and_leaves_nothing_behind(
    client: openai.OpenAI, url: str
) -> None:
    def ask(index: int) -> str:
        picture, leaves = PICTURES[index % len(PICTURES)], index % 2
        stream = create(client, asked(data_url(picture)), stream=True, temperature=1.0, seed=index)
        text = ""
        with stream:
            for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                if leaves and text:
                    return ""
        return text

    alone = {index: ask(index) for index in range(0, 24, 2)}
    with ThreadPoolExecutor(24) as pool:
        said = list(pool.map(ask, range(24)))
    assert {index: said[index] for index in alone} == alone
    for _ in range(10_000):
        if busy(url) == [0, 0, 0]:
            return
    raise AssertionError("something is still under way")


def busy(url: str) -> list[float]:
    """What waits, what runs, and its memory."""
    lines = dict(
        line.rsplit(" ", 1)
        for line in httpx.get(f"{url}/metrics").text.splitlines()
        if not line.startswith("#")
    )
    return [float(lines[f"itprune_{name}"]) for name in ("waiting", "running", "kv_bytes")]


# ------------------------------------------------------------------------------------- files
def test_allowed_files_can_be_named(client: openai.OpenAI, expected: Expected, files: Path) -> None:
    wanted = expected(shown(png()), 0.3)["answer"]
    for name in ("a.png", f"file://{files}/a.png", f"file:{files}/a.png", "good.png"):
        assert create(client, asked(name)).choices[0].message.content == wanted
    inner = expected(shown(png(seed=3)), 0.3)["answer"]
    for name in ("inner/b b.png", f"file://localhost{files}/inner/b%20b.png"):
        assert create(client, asked(name)).choices[0].message.content == inner


# ------------------------------------------------------------------------------------- the rest
def test_the_model_is_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("else")


def test_health_and_metrics(url: str) -> None:
    def figures() -> dict[str, float]:
        text = httpx.get(f"{url}/metrics").text
        rows = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in rows}

    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    before = figures()
    for _ in range(2):
        answer = httpx.post(f"{url}{CHAT}", json=body(data_url(PICTURES[0])), timeout=WAIT).json()
    httpx.post(f"{url}{CHAT}", json=body(keep=2), timeout=WAIT)
    after = figures()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    path = f'path="{CHAT}"'
    assert grown(f'itprune_requests_total{{{path},status="200"}}') == 2
    assert grown(f'itprune_requests_total{{{path},status="400"}}') == 1
    assert grown('itprune_answers_total{finish="length"}') == 2
    assert grown("itprune_prompt_tokens_total") == 2 * answer["usage"]["prompt_tokens"]
    assert grown("itprune_kept_tokens_total") == 2 * answer["itprune"]["kept_tokens"]
    assert grown("itprune_answer_tokens_total") == 2 * answer["usage"]["completion_tokens"]
    assert grown("itprune_first_token_seconds_count") == 2
    assert busy(url) == [0, 0, 0]
