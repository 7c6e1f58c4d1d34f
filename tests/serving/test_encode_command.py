"""`itprune encode` writes requests and has lines answered; the endpoint hands questions on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs pip install 'itprune[serve]'")
pytest.importorskip("httpx", reason="needs pip install 'itprune[serve]'")

import httpx
from safetensors.torch import load_file

from itprune.cli import encode, infer, serve
from itprune.cli.question_lines import Line
from itprune.cli.upstream import KEY, read_key
from itprune.question import Question
from itprune.serving.balance import read_urls
from itprune.serving.limits import Limits
from tests.serving.endpoint import asked, data_url, served
from tests.serving.fake_vllm import read_rows
from tests.serving.reference import Reference, picture
from tests.serving.upstreams import Servers, build_wide
from tests.tiny_llava import PLAIN

KEEP = 0.5
PROMPT = "What colour is the square?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wide(tmp_path_factory.mktemp("wide") / "model", PLAIN)


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[Servers]:
    servers = Servers(folder)
    yield servers
    servers.close()


@pytest.fixture(scope="module")
def own(folder: Path) -> Reference:
    return Reference(folder, KEEP)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two lines with pictures, one without, one that is wrong."""
    where = tmp_path_factory.mktemp("lines")
    records: list[dict[str, Any]] = [{"prompt": PROMPT, "id": "words"}]
    for seed in range(2):
        picture(seed).save(where / f"{seed}.png")
        records.append({"prompt": PROMPT, "image": f"{seed}.png", "id": seed})
    records.append({"prompt": PROMPT, "image": "missing.png"})
    path = where / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def options(module: Any, *words: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_parser(parser.add_subparsers())
    return parser.parse_args([str(word) for word in words])


def run(*words: Any) -> int:
    args = options(encode, "encode", "--quiet", *words)
    return args.run(args)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def own_answers(own: Reference) -> list[str]:
    asked = [Question.from_prompt(PROMPT)]
    asked += [Question.from_prompt(PROMPT, [picture(seed)]) for seed in range(2)]
    return [own.answer(question, 12).answer for question in asked]


# ------------------------------------------------------------------------------------ a folder
@pytest.mark.parametrize("wire", ["prompt", "images"])
def test_requests_can_be_sent_as_they_stand(
    servers: Servers, folder: Path, lines: Path, own: Reference, tmp_path: Path, wire: str
) -> None:
    output = tmp_path / "out"
    given = ("--model", folder, "--jsonl", lines, "--keep", KEEP, "--folder", output)
    assert run(*given, "--wire", wire, "--served-name", "its/own name", "--batch-size", 2) == 0
    requests = read_lines(output / "requests.jsonl")
    assert [one["custom_id"] for one in requests] == ["line-1", "line-2", "line-3"]
    url = servers.start().url
    for request, record in zip(requests, read_lines(output / "lines.jsonl"), strict=False):
        answer = httpx.request(request["method"], url + request["url"], json=request["body"])
        assert answer.status_code == 200
        held = load_file(output / record["file"])
        assert len(held["ids"]) == record["tokens_kept"]
        images = [value for name, value in held.items() if name != "ids"]
        assert sum(map(len, images)) == record["visual_kept"]
        assert record["visual_kept"] < max(record["visual_in"], 1)


def test_folder_holds_rows_records_and_what_went_wrong(
    folder: Path, lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert run("--model", folder, "--jsonl", lines, "--keep", KEEP, "--folder", output) == 0
    records = read_lines(output / "lines.jsonl")
    assert [record.get("id") for record in records] == ["words", 0, 1, None]
    assert "missing image" in records[3]["error"]
    assert sorted(path.name for path in (output / "rows").iterdir()) == [
        f"00000{number}.safetensors" for number in (1, 2, 3)
    ]
    body = read_lines(output / "requests.jsonl")[1]["body"]
    rows = load_file(output / records[1]["file"])
    whole = read_rows(body["prompt_embeds"])
    assert len(whole) == records[1]["tokens_kept"]
    assert body["model"] == "model"
    assert any(
        bool((whole[i : i + len(rows["image_0"])] == rows["image_0"]).all()) for i in range(9)
    )
    told = capsys.readouterr().err
    assert "3 requests (--enable-prompt-embeds)" in told
    assert "1 line(s) could not be encoded: 4" in told


def test_answers_are_asked_for_as_far_as_the_context_goes(folder: Path, tmp_path: Path) -> None:
    """vLLM refuses a request whose prompt and answer do not fit together."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out"
    texts = ("word " * 95, "word " * 3000)
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    assert run("--model", folder, "--jsonl", source, "--folder", output) == 0
    (request,) = read_lines(output / "requests.jsonl")
    fits, too_long = read_lines(output / "lines.jsonl")
    assert request["body"]["max_tokens"] == 512 - fits["tokens_kept"] < 128
    assert "the context of the model holds 512" in too_long["error"]


def test_a_line_of_brackets_without_end_is_one_bad_line() -> None:
    with pytest.raises(ValueError, match="not a question"):
        Line(1, b"[" * 100_000, "").record()


# ------------------------------------------------------------------------------------ answers
def test_lines_are_answered(
    servers: Servers, folder: Path, lines: Path, own: Reference, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    urls = ",".join(servers.start().url for _ in range(2))
    given = ("--model", folder, "--jsonl", lines, "--keep", KEEP, "--max-new-tokens", 12)
    assert run(*given, "--output", output, "--upstream", urls) == 0
    records = read_lines(output)
    assert [record["line"] for record in records] == [1, 2, 3, 4]
    assert [record.get("answer") for record in records] == [*own_answers(own), None]
    assert run(*given, "--output", output, "--upstream", "http://127.0.0.1:1") == 0  # all done
    assert read_lines(output) == records


@pytest.mark.parametrize(
    "words",
    [("--wire", "images"), ("--same-count", 3), ("--rows-dtype", "bfloat16")],
    ids=lambda words: words[0],
)
def test_answers_of_other_settings_are_not_gone_on_with(
    servers: Servers, folder: Path, lines: Path, tmp_path: Path, words: tuple[Any, ...]
) -> None:
    output = tmp_path / "out.jsonl"
    given = ("--model", folder, "--jsonl", lines, "--max-new-tokens", 2, "--output", output)
    upstream = ("--upstream", servers.start().url)
    assert run(*given, *upstream) == 0
    with pytest.raises(ValueError, match="other settings"):
        run(*given, *upstream, *words)
    with pytest.raises(ValueError, match="other settings"):
        infer.run(options(infer, "infer", "--quiet", *given))


def test_a_line_that_takes_too_long_is_an_error(
    servers: Servers, folder: Path, lines: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    given = ("--model", folder, "--jsonl", lines, "--upstream", servers.start(hold=2).url)
    assert run(*given, "--output", output, "--max-seconds", 0.5, "--concurrency", 4) == 1
    told = [record["error"] for record in read_lines(output)]
    assert told[:3] == ["no answer within 0.5 seconds"] * 3


def test_lines_wait_for_busy_servers_and_are_left_where_it_is_of_no_use(
    servers: Servers, folder: Path, lines: Path, own: Reference, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    given = ("--model", folder, "--jsonl", lines, "--keep", KEEP, "--max-new-tokens", 12)
    given += ("--output", output)
    busy = servers.start(status=429)
    with pytest.raises(ValueError, match=r"busy; .* the same command goes on"):
        run(*given, "--upstream", busy.url, "--max-seconds", 2)
    assert [record["line"] for record in read_lines(output)] == [4]  # the bad one
    relieved = servers.start(busy=6)
    assert run(*given, "--upstream", relieved.url) == 0
    assert [record.get("answer") for record in read_lines(output)] == [*own_answers(own), None]


def test_lines_are_left_where_the_last_server_dies(
    servers: Servers, folder: Path, lines: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    given = ("--model", folder, "--jsonl", lines, "--max-new-tokens", 12, "--output", output)
    server = servers.start(die=2)
    with pytest.raises(ValueError, match=r"no server .* the same command goes on"):
        run(*given, "--upstream", server.url, "--max-seconds", 4, "--concurrency", 4)
    assert [record["line"] for record in read_lines(output)] == [4]


def test_no_server_is_one_sentence(folder: Path, lines: Path, tmp_path: Path) -> None:
    given = ("--model", folder, "--jsonl", lines, "--output", tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="--upstream: no server behind this one answers"):
        run(*given, "--upstream", "http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "--jsonl"),
        (("--jsonl", "x"), "either --folder"),
        (("--jsonl", "x", "--folder", "y", "--upstream", "http://a"), "either --folder"),
        (("--jsonl", "x", "--folder", "y", "--output", "z"), "--output is for the answers"),
        (("--jsonl", "x", "--upstream", "http://a", "--concurrency", "0"), "--concurrency"),
        (("--jsonl", "x", "--upstream", "http://a", "--max-seconds", "-1"), "--max-seconds"),
    ],
)
def test_options_that_do_not_go_together(
    folder: Path, words: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        run("--model", folder, *words)


# ------------------------------------------------------------------------------------ endpoint
def serving(folder: Path, *words: Any) -> Any:
    args = options(serve, "serve", folder, "--keep", KEEP, *words)
    return serve.make_backend(args, Limits())


@pytest.mark.parametrize("stream", [False, True])
def test_an_openai_client_is_answered_by_servers_elsewhere(
    servers: Servers, folder: Path, own: Reference, tmp_path: Path, stream: bool
) -> None:
    openai = pytest.importorskip("openai", reason="needs pip install 'itprune[dev]'")
    picture(0).save(tmp_path / "a.png")
    first, second = servers.start(hold=5), servers.start()
    backend = serving(folder, "--engine", "vllm", "--upstream", f"{first.url},{second.url}")
    with served(backend) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        messages = asked(data_url((tmp_path / "a.png").read_bytes()), text=PROMPT)
        given = {"model": "model", "messages": messages, "max_tokens": 12, "temperature": 0}
        if stream:
            text = ""
            for chunk in client.chat.completions.create(**given, stream=True):
                text += chunk.choices[0].delta.content or ""
                if len(text) > 2:
                    first.kill()
        else:
            first.kill()
            text = client.chat.completions.create(**given).choices[0].message.content
        assert text == own_answers(own)[1]
        figures = httpx.get(f"{url}/metrics").text
        assert 'itprune_upstream_up{upstream="' in figures


@pytest.mark.parametrize("words", [("--engine", "vllm"), ("--upstream", "http://127.0.0.1:1")])
def test_engine_and_upstream_belong_together(folder: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="belong together"):
        serving(folder, *words)


# ------------------------------------------------------------------------------------ addresses
def test_addresses_are_read_with_and_without_v1() -> None:
    assert read_urls("http://a:8000/v1, https://b/,") == ("http://a:8000", "https://b")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " , ",
        "a:8000",
        "ftp://a",
        "http://",
        "http://a:x",
        "http://a/b",
        "http://a?b=1",
        "http://a b",
    ],
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="--upstream: "):
        read_urls(text)


def test_an_address_with_a_password_is_not_repeated() -> None:
    with pytest.raises(ValueError, match="holds no password") as told:
        read_urls("http://user:secret@a:8000")
    assert "secret" not in str(told.value)


def test_an_address_stands_once() -> None:
    with pytest.raises(ValueError, match="named twice"):
        read_urls("http://a:1,http://a:1/v1")


def test_the_key_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    assert read_key(None) == ""
    monkeypatch.setenv(KEY, "from-outside")
    assert read_key(None) == "from-outside"
    for wrong in ("no\nheader", "schlüssel", "bell\a"):
        monkeypatch.setenv(KEY, wrong)
        with pytest.raises(ValueError, match=f"^{KEY}: a key must have plain letters") as told:
            read_key(None)
        assert wrong not in str(told.value)
    file = tmp_path / "key"
    file.write_text("word\n")
    assert read_key(file) == "word"
    for text, words in (("two words", "no spaces"), ("two\nlines", "must hold one key")):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_key(file)
    with pytest.raises(ValueError, match="cannot be read"):
        read_key(tmp_path / "none")
