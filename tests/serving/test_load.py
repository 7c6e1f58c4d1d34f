"""64 clients at once, each with OpenAI's own package: nobody is lost, and everybody gets the answer
that the same question gets alone."""

from __future__ import annotations

import io
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from PIL import Image

from itprune import load_pretrained
from itprune.answer import Answer, Answerer
from itprune.decoding import Decoding
from itprune.question import Question
from itprune.serving.admission import Admission
from itprune.serving.local import LocalBackend
from tests.app.asking import png
from tests.serving.endpoint import CHAT, MODEL, asked, data_url, limited, served

BUNDLED = Path(__file__).parents[2] / "assets" / "tiny-llava"
CROWD = 64
PATIENCE = 240
"""Seconds after which a client that hangs fails; 64 share a slow machine."""
SIZES = ((96, 96), (140, 70), (60, 90), (200, 120), (48, 48))
TEXTS = (
    "What digit is red?",
    "Is there a circle?",
    "Look at the whole picture, from left to right and from top to bottom. What colour is the "
    "largest shape in it, and what stands beside it?",
    "Describe the picture.",
)
SETTINGS = (
    ("itprune", 0.22),
    ("itprune", 1.0),
    ("visionzip", 0.3),
    ("itprune", 0.5),
    ("fastv", 0.5),
)
LIMITS = limited(images=4, pixels=1_000_000, body_mb=1.0)


@dataclass(frozen=True)
class Case:
    """One client's request."""

    pictures: tuple[bytes, ...]
    text: str
    method: str
    keep: float
    stream: bool
    tokens: int

    @property
    def question(self) -> Question:
        shown = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in self.pictures]
        return Question.from_prompt(self.text, shown)


def cases(settings: Sequence[tuple[str, float]]) -> list[Case]:
    """None to three pictures of five sizes; every setting, text and length of answers."""
    made = []
    for number in range(CROWD):
        pictures = [
            png(SIZES[(number + n) % len(SIZES)], seed=(3 * number + n) % 11)
            for n in range((1, 2, 1, 0, 1, 3, 1, 1)[number % 8])
        ]
        method, keep = settings[number % len(settings)]
        text = TEXTS[number % 7 % len(TEXTS)]
        tokens = (2, 24, 9)[number % 3]
        made.append(Case(tuple(pictures), text, method, keep, number % 2 == 0, tokens))
    return made


def alone(folder: Path, cases: Sequence[Case]) -> list[Answer]:
    """What each is answered by itself."""
    found: dict[Case, Answer] = {}
    for method, keep in dict.fromkeys((case.method, case.keep) for case in cases):
        loaded = load_pretrained(folder, keep=keep, method=method, dtype=torch.float32)
        for case in cases:
            if (case.method, case.keep) == (method, keep):
                answerer = Answerer(loaded, Decoding(max_new_tokens=case.tokens))
                found[case] = answerer([case.question])[0]
    return [found[case] for case in cases]


@dataclass(frozen=True)
class Heard:
    """What a client got."""

    text: str
    finish: str
    usage: Any
    pruner: dict[str, Any]


def ask(client: openai.OpenAI, case: Case) -> Heard:
    request = {
        "model": MODEL,
        "messages": asked(*map(data_url, case.pictures), text=case.text),
        "max_tokens": case.tokens,
        "extra_body": {"method": case.method, "keep": case.keep},
    }
    if not case.stream:
        whole = client.chat.completions.create(**request)
        (choice,) = whole.choices
        return Heard(choice.message.content, choice.finish_reason, whole.usage, whole.itprune)
    options = {"include_usage": True}
    *chunks, last = client.chat.completions.create(**request, stream=True, stream_options=options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    return Heard(text, chunks[-1].choices[0].finish_reason, last.usage, last.itprune)


def crowd(url: str, cases: Sequence[Case]) -> list[Heard]:
    """All ask at the same moment."""
    everyone = threading.Barrier(len(cases))

    def one(case: Case) -> Heard:
        everyone.wait(PATIENCE)
        return ask(client, case)

    with (
        openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE
        ) as client,
        ThreadPoolExecutor(len(cases)) as pool,
    ):
        return list(pool.map(one, cases))


def figures(text: str) -> dict[str, float]:
    pairs = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


@pytest.mark.parametrize(("which", "rows"), [("bundled", 64), ("sizes", 64), ("sizes", 5)], ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_64_at_once_get_what_each_gets_alone(which: str, rows: int, folder: Path) -> None:
    model = BUNDLED if which == "bundled" else folder
    settings = SETTINGS if which == "bundled" else (*SETTINGS[:2], ("random", 0.4), *SETTINGS[3:])
    wanted = cases(settings)
    backend = LocalBackend(
        load_pretrained(model, dtype=torch.float32),
        name=MODEL,
        method="itprune",
        keep=0.3,
        offered=tuple({method for method, _ in settings}),
        limits=Admission(kv_bytes=1 << 30, rows=rows),
    )
    with served(backend, LIMITS) as (url, server):
        said = crowd(url, wanted)
        left = figures(httpx.get(f"{url}/metrics", timeout=PATIENCE).text)
    assert [left[f"itprune_{name}"] for name in ("waiting", "running", "kv_bytes")] == [0, 0, 0]
    # A client has read its answer a moment before the server counts it; now all are counted.
    check_metrics(figures(server.endpoint.metrics.text().decode()), said)
    expected = alone(model, wanted)
    for case, heard, answer in zip(wanted, said, expected, strict=True):
        assert heard.text == answer.answer, case.text
        assert heard.finish == answer.finish
        assert heard.usage.prompt_tokens == answer.tokens_in
        assert heard.usage.completion_tokens == answer.tokens_out
        assert heard.pruner == {
            "method": case.method,
            "keep": case.keep,
            "kept_tokens": answer.tokens_stage1,
            "visual_tokens": answer.visual_in,
            "kept_visual_tokens": answer.visual_stage1,
        }
    if which == "sizes":
        assert len({heard.text for heard in said}) > CROWD / 2
        assert len({heard.pruner["visual_tokens"] for heard in said}) > 8


def check_metrics(after: dict[str, float], said: Sequence[Heard]) -> None:
    """They add up to what the clients heard."""
    assert after[f'itprune_requests_total{{path="{CHAT}",status="200"}}'] == len(said)
    for finish, count in Counter(heard.finish for heard in said).items():
        assert after[f'itprune_answers_total{{finish="{finish}"}}'] == count
    sums = {
        "prompt": [heard.usage.prompt_tokens for heard in said],
        "answer": [heard.usage.completion_tokens for heard in said],
        "kept": [heard.pruner["kept_tokens"] for heard in said],
        "visual": [heard.pruner["visual_tokens"] for heard in said],
        "kept_visual": [heard.pruner["kept_visual_tokens"] for heard in said],
    }
    for name, counts in sums.items():
        assert after[f"itprune_{name}_tokens_total"] == sum(counts)
    for name in ("first_token", "answer"):
        assert after[f"itprune_{name}_seconds_count"] == len(said)
