"""Our endpoint and our command before a real vLLM server answer as the pruned model itself."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from itprune.cli import main
from itprune.question import Question
from tests.lmms.inside import Inside
from tests.serving.reference import Reference
from tests.vllm.documented import documented
from tests.vllm.models import QUESTION, pictures
from tests.vllm.server import SMALL, TOKENS, Server, at_once, free_port, node, serving, shown, text

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vllm")]
REQUESTS = 24
COUNT = 6
"""Rows of every image for vLLM's batch runner."""
OFFLINE = SMALL[: SMALL.index("--host")]


@pytest.fixture(scope="module")
def asked(exported: Path) -> list[tuple[Question, str]]:
    """Questions about no, one and two pictures, and what the pruned model says by itself."""
    seen = pictures(31, 11)
    shared = [
        [],
        *([picture] for picture in seen[:15]),
        *zip(seen[15::2], seen[16::2], strict=False),
    ]
    questions = [Question.from_prompt(QUESTION, list(some)) for some in shared[:REQUESTS]]
    own = Reference(exported, None)
    return [(question, own.answer(question, TOKENS).answer) for question in questions]


@contextmanager
def front(vllm: Inside, exported: Path, *upstream: Server) -> Iterator[Server]:
    """Our endpoint before servers, by the documented command."""
    port = free_port()
    ((_, *words),) = documented("itprune", "serve")
    words[words.index("outputs/deployed")] = str(exported)
    words[words.index("--upstream") + 1] = ",".join(server.url for server in upstream)
    words += ["--port", str(port)]
    command = [sys.executable, "-m", "itprune.cli", *words]
    with serving(vllm, command, exported.name, port) as server:
        yield server


def ask(server: Server, question: Question) -> str:
    content = [*map(shown, question.images), text(QUESTION)]
    status, answer = server.ask(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": content}],
        ignore_eos=None,
        return_token_ids=None,
    )
    assert status == 200, answer
    said: str = answer["choices"][0]["message"]["content"]
    return said


def test_the_endpoint(
    vllm: Inside, stock: Server, exported: Path, asked: list[tuple[Question, str]]
) -> None:
    with front(vllm, exported, stock) as server:
        said = at_once(lambda one: ask(server, one[0]), asked)
    assert said == [answer for _, answer in asked]


def test_a_server_that_is_killed_takes_no_request_with_it(
    vllm: Inside, stock: Server, exported: Path, asked: list[tuple[Question, str]]
) -> None:
    with node(vllm, exported) as second, front(vllm, exported, stock, second) as server:

        def one(number: int) -> str:
            if number == len(asked) // 2:
                os.killpg(second.process.pid, signal.SIGKILL)
            return ask(server, asked[number][0])

        said = at_once(one, range(len(asked)))
    assert said == [answer for _, answer in asked]


@pytest.fixture
def here(exported: Path, asked: list[tuple[Question, str]], tmp_path: Path) -> dict[str, str]:
    """What the documented names are in these tests; the questions lie there as a file."""
    lines = []
    for number, (question, _) in enumerate(asked):
        names = [f"{number}-{place}.png" for place in range(len(question.images))]
        for name, picture in zip(names, question.images, strict=True):
            picture.save(tmp_path / name)
        lines.append(json.dumps({"prompt": QUESTION, "images": names}))
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    names = ("in.jsonl", "out.jsonl", "answers.jsonl", "build/rows", "build/rows/requests.jsonl")
    own = {name: str(tmp_path / name) for name in names}
    return {**own, "outputs/deployed": str(exported), "deployed": exported.name}


def read_lines(path: str) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_file_of_questions(
    stock: Server, here: dict[str, str], asked: list[tuple[Question, str]]
) -> None:
    words = [here.get(word, word) for word in documented("itprune", "encode")[0][1:]]
    words[words.index("--upstream") + 1] = stock.url
    assert main([*words, "--max-new-tokens", str(TOKENS), "--quiet"]) == 0
    told = sorted(read_lines(here["out.jsonl"]), key=lambda line: line["line"])
    assert [line["answer"] for line in told] == [answer for _, answer in asked]


def test_vllms_batch_runner(
    vllm: Inside, exported: Path, here: dict[str, str], asked: list[tuple[Question, str]]
) -> None:
    words = [here.get(word, word) for word in documented("itprune", "encode")[1][1:]]
    words[words.index("--same-count") + 1] = str(COUNT)
    assert main([*words, "--max-new-tokens", str(TOKENS), "--quiet"]) == 0
    ((_, *words),) = documented("python", "-m", "vllm.entrypoints.openai.run_batch")
    words = [here.get(word, word) for word in words]
    run = vllm.run(vllm.python, *words, *OFFLINE)
    assert run.returncode == 0, run.stderr[-3000:]
    told = {line["custom_id"]: line for line in read_lines(here["answers.jsonl"])}
    own = Reference(exported, None, stage1={"rule": "topk", "keep": COUNT})
    for number, (question, _) in enumerate(asked, 1):
        choice = told[f"line-{number}"]["response"]["body"]["choices"][0]
        # Half a letter at the cut is left out by vLLM, and shown as this mark by us.
        answer = own.answer(question, TOKENS).answer.rstrip("\N{REPLACEMENT CHARACTER}")
        assert choice["message"]["content"].strip() == answer
