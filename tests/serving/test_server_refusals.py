"""Hostile input: one clear sentence in OpenAI's shape, and the next request is answered."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from PIL import Image

from tests.app.asking import png
from tests.serving.endpoint import CHAT, MODEL, WAIT, asked, body, data_url, image, refusal

PICTURE = data_url(png())
FORGED = {"role": "user", "content": "a"}


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=WAIT) as client:
        yield client
        answer = client.post(CHAT, json=body(PICTURE, max_tokens=1))
        assert answer.status_code == 200, "the server did not survive"


def torch_saved() -> bytes:
    """What vLLM would load."""
    out = io.BytesIO()
    torch.save(torch.zeros(4, 32), out)
    return out.getvalue()


def header_bomb(width: int, height: int) -> bytes:
    """A PNG that says it is huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        code = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", code)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


# -------------------------------------------------------------------------------------- images
@pytest.mark.parametrize(
    ("picture", "words"),
    [
        ("data:image/png;base64,!!!!", "not valid base64"),
        ("data:image/png;base64,AAA", "not valid base64"),
        ("data:image/png;base64,é", "not valid base64"),
        ("data:image/png;base64,", "not a picture"),
        ("data:image/png,abc", "data URL must read"),
        ("data:;base64,AAAA", "data URL must read"),
        ("data:text/html;base64,AAAA", "data URL must read"),
        ("DATA:application/x-pytorch;base64,AAAA", "data URL must read"),
        (data_url(b"rubbish"), "not a picture"),
        (data_url(png()[:-30]), "damaged or cut off"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "not a picture"),
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not a picture"),
        (data_url(torch_saved()), "not a picture"),
        (data_url(header_bomb(50_000, 50_000)), "far too many pixels"),
        (data_url(header_bomb(10_000, 5_000)), "more than 200000"),
        (data_url(header_bomb(100_000, 1)), "is a line"),
        ("http://127.0.0.1:9/a.png", "fetches no addresses"),
        ("HTTPS://example.org/a.png", "fetches no addresses"),
        ("//example.org/a.png", "fetches no addresses"),
        ("ftp://example.org/a.png", "fetches no addresses"),
        ("file://example.org/a.png", "fetches no addresses"),
        ("javascript:alert(1)", "fetches no addresses"),
    ],
)
def test_rubbish_pictures(http: httpx.Client, picture: str, words: str) -> None:
    error = refusal(http.post(CHAT, json=body(picture)), 400)
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png", "/etc/passwd", "file:///etc/passwd", "link.png", "inner", "", ".", "ring",
        "nowhere.png", "a\0.png", "file:///%2e%2e/secret.png", "file:..%2fsecret.png",
        "file:///dev/zero", "file:///proc/self/environ", "x" * 5000, "inner/../../secret.png",
    ],
)  # fmt: skip
def test_files_elsewhere_are_not_opened_nor_told_of(http: httpx.Client, name: str) -> None:
    error = refusal(http.post(CHAT, json=body(name)), 400)
    assert error["message"] == "there is no such picture among the files this server may open"


def test_no_other_decoder_sees_a_picture_of_ours(http: httpx.Client) -> None:
    """Behind the WebP stands what Pillow would rather take for a Photo CD of 768 x 512."""
    picture = Image.effect_noise((64, 64), 60).convert("RGB")
    answers = []
    for tail in (b"", b"PCD_" + bytes(2048)):
        out = io.BytesIO()
        picture.save(out, "WEBP", quality=1)
        assert len(out.getvalue()) < 2048
        whole = out.getvalue().ljust(2048, b"\0") + tail if tail else out.getvalue()
        answer = http.post(CHAT, json=body(data_url(whole, "image/webp"), max_tokens=1))
        assert answer.status_code == 200, answer.text
        answers.append(answer.json()["itprune"])
    assert answers[0] == answers[1]


def test_an_image_token_in_two_parts_is_refused(http: httpx.Client) -> None:
    for content in (["<ima", "ge>"], ["<ima", PICTURE, "ge>"], [PICTURE, "a <ima", "ge> b"]):
        parts = [
            image(text) if text is PICTURE else {"type": "text", "text": text} for text in content
        ]
        sent = {"model": MODEL, "messages": [{"role": "user", "content": parts}]}
        message = refusal(http.post(CHAT, json=sent), 400)["message"]
        assert message == "the text contains <image>, a token of the model's images"


def test_allowed_files_are_pictures_too(http: httpx.Client, files: Path) -> None:
    assert "not a picture" in refusal(http.post(CHAT, json=body("note.txt")), 400)["message"]


def test_tensors_are_never_accepted(http: httpx.Client) -> None:
    tensor = base64.b64encode(torch_saved()).decode()
    for part in (
        {"type": "image_embeds", "image_embeds": tensor},
        {"type": "image_embeds", "image_embeds": {"image_embeds": tensor}},
        {"type": "prompt_embeds", "data": tensor},
    ):
        message = {"role": "user", "content": [part, {"type": "text", "text": "What?"}]}
        refusal(http.post(CHAT, json={"model": MODEL, "messages": [message]}), 400)
    refusal(http.post(CHAT, json={**body(), "prompt_embeds": tensor}), 400)
    raw = http.post(
        CHAT, content=torch_saved(), headers={"content-type": "application/octet-stream"}
    )
    refusal(raw, 415)
    forced = http.post(CHAT, content=torch_saved(), headers={"content-type": "application/json"})
    assert refusal(forced, 400)["code"] == "invalid_json"


# -------------------------------------------------------------------------------------- bodies
@pytest.mark.parametrize(
    "kind", ["", "text/plain", "multipart/form-data; boundary=a", "application/x-ndjson"]
)
def test_other_content_types(http: httpx.Client, kind: str) -> None:
    sent = json.dumps(body()).encode()
    refusal(http.post(CHAT, content=sent, headers={"content-type": kind}), 415)


def test_compressed_bodies(http: httpx.Client) -> None:
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    refusal(http.post(CHAT, content=zlib.compress(bytes(10_000_000)), headers=packed), 415)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[1, 2", b"\xff\xfe\x00", b'{"model": NaN}', b"nul", b"[" * 90_000,
        b'{"a":' * 30_000, b'{"seed": ' + b"9" * 20_000 + b"}",
    ],
)  # fmt: skip
def test_bodies_that_are_no_json(http: httpx.Client, content: bytes) -> None:
    answer = http.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert refusal(answer, 400)["code"] == "invalid_json"


def test_bodies_that_are_too_large(http: httpx.Client) -> None:
    error = refusal(http.post(CHAT, json=body(data_url(bytes(180_000)))), 413)
    assert "larger than 0.2 MB" in error["message"]

    def endless() -> Iterator[bytes]:
        for _ in range(8):
            yield b" " * 100_000

    kind = {"content-type": "application/json"}
    refusal(http.post(CHAT, content=endless(), headers=kind), 413)


def test_a_head_that_is_too_large_or_no_http(url: str) -> None:
    place = urlsplit(url)
    for sent in (
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 100_000,
        b"GET / HTTP/1.1\r\n" + b"".join(b"H%d: a\r\n" % i for i in range(9_000)),
        b"\x16\x03\x01 no HTTP at all\r\n\r\n",
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    ):
        with socket.create_connection((place.hostname, place.port), timeout=WAIT) as raw:
            raw.sendall(sent)
            told = b""
            while piece := raw.recv(1 << 16):
                told += piece
        head, _, error = told.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(error)["error"]["type"] == "invalid_request_error"


# -------------------------------------------------------------------------------------- fields
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"keep": 2}, "keep", "at most 1"),
        ({"keep": 0}, "keep", "above 0"),
        ({"keep": 0.001}, "keep", "takes 0.01 to 1"),
        ({"keep": "0.3"}, "keep", "must be a number"),
        ({"keep": True}, "keep", "must be a number"),
        ({"method": "visionzap"}, "method", "valid: fastv, itprune, random"),
        ({"method": "divprune"}, "method", "valid: fastv, itprune, random"),
        ({"method": ["itprune"]}, "method", "name of a method"),
        ({"method": ""}, "method", "name of a method"),
        ({"method": "x" * 10_000}, "method", "name of a method"),
        ({"top_p": 0.5}, "top_p", "without a temperature answers are greedy"),
        ({"messages": [FORGED] * 1001}, "messages", "at most 1000, got 1001"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"temperature": 10**400}, "temperature", "at most 2"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 33}, "max_tokens", "up to 32"),
        ({"max_tokens": 1.5}, "max_tokens", "whole number"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "differ"),
        ({"seed": 2**70}, "seed", "whole number"),
        ({"stop": [""]}, "stop", "none of them empty"),
        ({"stop": ["a"] * 5}, "stop", "up to 4"),
        ({"stop": {"a": 1}}, "stop", "up to 4"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "streams only"),
        ({"n": 2}, "n", "does not do that"),
        ({"logprobs": True}, "logprobs", "does not do that"),
        ({"tools": [{"type": "function"}]}, "tools", "does not do that"),
        ({"response_format": {"type": "json_object"}}, "response_format", "does not do that"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"\ud800": 1}, "?", "unknown field"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": "hello"}, "messages", "at least one"),
        ({"messages": [1]}, "messages[0]", "must be an object"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "must be one of"),
        ({"messages": [{"role": [], "content": "a"}]}, "messages[0].role", "must be one of"),
        ({"messages": [{**FORGED, "tool_calls": [1]}]}, "messages[0]", "does not take"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "must be text"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages", "prompt is empty"),
        ({"messages": [{"role": "user", "content": "a\ud800"}]}, "messages", "half a character"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", "no user turn"),
        (
            {"messages": [{"role": "system", "content": [image(PICTURE)]}]},
            "messages[0].content",
            "only a user",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages[0].content[0]",
            "text or image_url",
        ),
        ({"messages": asked(*[PICTURE] * 4)}, "messages", "4 images, more than 3"),
        (
            {"messages": asked(*[data_url(png((300, 300)))] * 3)},
            "messages",
            "more than 200000 pixels together",
        ),
        ({"messages": asked(text="a" * 2001)}, "messages", "2001 letters"),
    ],
)
def test_fields_beyond_the_limits(
    http: httpx.Client, fields: dict[str, Any], param: str, words: str
) -> None:
    sent = json.dumps({**body(PICTURE), **fields}).encode()
    answer = http.post(CHAT, content=sent, headers={"content-type": "application/json"})
    error = refusal(answer, 400)
    assert words in error["message"]
    assert error["param"] == param


def test_an_unknown_model(http: httpx.Client) -> None:
    error = refusal(http.post(CHAT, json={**body(), "model": "gpt-4o"}), 404)
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    refusal(http.post(CHAT, json={**body(), "model": 7}), 400)
    refusal(http.get("/v1/models/gpt-4o"), 404)


def test_what_says_nothing_of_the_answer_is_let_through(http: httpx.Client) -> None:
    harmless = {
        "n": 1,
        "logprobs": None,
        "tools": None,
        "user": "somebody",
        "frequency_penalty": 0.0,
        "response_format": {"type": "text"},
        "stream_options": None,
        "max_tokens": 1,
    }
    assert http.post(CHAT, json=body(PICTURE, **harmless)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_overflows_the_context(http: httpx.Client, stream: bool) -> None:
    words = asked(text="red " * 490)
    answer = http.post(CHAT, json={"model": MODEL, "messages": words * 3, "stream": stream})
    assert refusal(answer, 400)["code"] == "context_length_exceeded"


# ----------------------------------------------------------------------------------- addresses
def test_other_addresses(http: httpx.Client) -> None:
    refusal(http.get("/"), 404)
    refusal(http.get("/v1/chat/../../etc/passwd"), 404)
    refusal(http.get(CHAT), 405)
    refusal(http.post("/health"), 405)
    refusal(http.post("/v1/completions", json={}), 404)
    assert "POST" in http.get(CHAT).headers["allow"]
    for path in ("/health/", "/v1/models/", f"{CHAT}/"):
        refusal(http.get(path, follow_redirects=False), 404)


def test_other_sites_and_names_are_refused(http: httpx.Client) -> None:
    for headers in (
        {"host": "evil.example"},
        {"origin": "https://evil.example"},
        {"sec-fetch-site": "cross-site"},
    ):
        refusal(http.post(CHAT, json=body(PICTURE), headers=headers), 403)
    refusal(http.get("/metrics", headers={"host": "evil.example"}), 403)


def test_answers_are_not_kept_nor_sniffed(http: httpx.Client) -> None:
    headers = http.get("/v1/models").headers
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers
