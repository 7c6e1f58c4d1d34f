"""What the server hands out, to whom, and how it refuses."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from itprune import load_pretrained
from itprune.answer import Answerer
from itprune.app.policy import POLICY
from itprune.app.server import STATIC
from itprune.app.session import Session
from itprune.decoding import Decoding
from itprune.pages import PALETTE
from itprune.question import Question
from itprune.web.texts import as_text
from tests.app.asking import answers, events, form, png
from tests.app.conftest import BUNDLED

STATIC_FOLDER = Path(__file__).parents[2] / "itprune" / "app" / "static"


def ask(client: TestClient, picture: bytes | None, **fields: str) -> tuple[int, str]:
    body, headers = form(picture, **fields)
    response = client.post("/api/ask", content=body, headers=headers)
    return response.status_code, response.text


# -------------------------------------------------------------------------------- the page
@pytest.mark.parametrize("path", STATIC)
def test_the_page_is_served_with_a_strict_policy(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith(STATIC[path][2])
    assert response.headers["content-security-policy"] == POLICY
    assert "unsafe" not in POLICY
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-store"


def test_the_page_names_no_other_host_and_holds_nothing_inline() -> None:
    for path in STATIC_FOLDER.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text), path.name
    html = (STATIC_FOLDER / "index.html").read_text()
    assert not re.search(r"<style|style=|<script>| on[a-z]+=", html)
    script = "".join(path.read_text() for path in STATIC_FOLDER.glob("*.js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(|document\.write", script)


def test_every_control_of_the_page_has_a_label() -> None:
    html = (STATIC_FOLDER / "index.html").read_text()
    for name in re.findall(r'<(?:input|select|textarea)[^>]* id="(\w+)"', html):
        wrapped = re.search(rf'<label class="check"><input[^>]* id="{name}"', html)
        assert wrapped or f'for="{name}"' in html, name


def test_the_icon_has_the_colours_of_all_pages() -> None:
    icon = (STATIC_FOLDER / "icon.svg").read_text()
    assert set(re.findall(r"#[0-9A-F]{6}", icon)) <= set(PALETTE)


def test_the_facts_name_the_methods_that_fit_and_no_path(client: TestClient) -> None:
    facts = client.get("/api/model").json()
    names = [method["name"] for method in facts["methods"]]
    assert facts["model"] == "tiny-llava"
    assert facts["family"] == "llava"
    assert names[0] == facts["method"] == "itprune"
    assert {"visionzip", "fastv", "random"} <= set(names)
    assert not {"dense", "setok", "dyvte"} & set(names)  # two of them need training
    assert facts["keep"] == 0.22
    notes = {method["name"]: method["note"] for method in facts["methods"]}
    assert "not calibrated" in notes["itprune"]
    assert notes["random"] == notes["visionzip"] == ""
    assert "/" not in facts["model"]


# -------------------------------------------------------------------------------- answers
def test_an_answer_is_that_of_infer_with_its_figures(client: TestClient) -> None:
    status, text = ask(client, png(), beside="1")
    told = events(text)
    assert status == 200
    kinds = [event["kind"] for event in told]
    assert kinds[0] == "queue"
    assert kinds[-1] == "end"
    assert [e["column"] for e in told if e["kind"] == "start"] == ["pruned", "dense"]
    for keep, column in ((0.3, "pruned"), (1.0, "dense")):
        expected = infer(png(), keep)
        done = answers(told)[column]
        for name in ("answer", "tokens_in", "tokens_stage1", "tokens_stage2", "kv_bytes", "finish"):
            assert done[name] == expected[name], (column, name)
        pieces = [e["text"] for e in told if e["kind"] == "text" and e["column"] == column]
        assert "".join(pieces) == expected["answer"]


def infer(picture: bytes, keep: float) -> dict[str, object]:
    from itprune.web.pictures import read_picture

    answerer = Answerer(load_pretrained(BUNDLED, keep=keep), Decoding(max_new_tokens=32))
    question = Question.from_prompt("What digit is red?", [read_picture(picture, 10**6)])
    return answerer([question])[0].to_dict()


def test_what_is_kept_is_told_stage_by_stage(client: TestClient) -> None:
    told = events(ask(client, png())[1])
    (kept,) = [event for event in told if event["kind"] == "kept"]
    done = answers(told)["pruned"]
    (grid,) = kept["grids"]
    assert (grid["rows"], grid["columns"]) == (12, 12)
    first, second = kept["stages"]
    assert (first["layer"], first["kept"]) == (0, done["visual_stage1"])
    assert second["kept"] == done["visual_stage2"]
    for stage in kept["stages"]:
        assert stage["of"] == 144
        assert stage["masks"][0].count("1") == stage["kept"]
        assert len(stage["masks"][0]) == 144
    later = zip(first["masks"][0], second["masks"][0], strict=True)
    assert all(a >= b for a, b in later)  # what stage 1 dropped does not come back


@pytest.mark.parametrize("method", ["random", "fastv", "downsample", "visionzip", "pyramiddrop"])
def test_other_methods_are_a_choice_of_each_question(client: TestClient, method: str) -> None:
    told = events(ask(client, png(), method=method, keep="0.6")[1])
    assert answers(told)["pruned"]["visual_layer_average"] < 1
    assert [event for event in told if event["kind"] == "kept"]


def test_keep_of_everything_is_the_dense_model(client: TestClient) -> None:
    told = events(ask(client, png(), keep="1.0", beside="1")[1])
    pruned, dense = (answers(told)[column] for column in ("pruned", "dense"))
    assert pruned["answer"] == dense["answer"]
    assert pruned["kv_bytes"] == dense["kv_bytes"]


@pytest.mark.parametrize("typed", ["<image>", "<b>red</b> <script>alert(1)</script>", "<image" * 9])
def test_what_is_typed_is_text(client: TestClient, typed: str) -> None:
    status, text = ask(client, png(), prompt=f"What is {typed} red?")
    assert status == 200
    assert "pruned" in answers(events(text))


def test_reserved_texts_are_broken_up_and_others_left() -> None:
    assert as_text("a <image> b", ("<image>",)) == "a < image> b"
    assert as_text("<b>", ("<image>",)) == "<b>"


def test_a_line_break_of_a_form_is_that_of_a_prompt(client: TestClient) -> None:
    """Browsers send every line break of a form as two characters."""
    lines = "What digit\nis\nred?"
    plain, typed = (
        answers(events(ask(client, png(), prompt=prompt)[1]))["pruned"]
        for prompt in (lines, lines.replace("\n", "\r\n"))
    )
    assert typed["tokens_in"] == plain["tokens_in"]
    long = "\r\n".join("a" * 150)
    assert ask(client, png(), prompt=long)[0] == 200


def test_a_wide_picture_shows_which_part_the_model_saw(client: TestClient) -> None:
    told = events(ask(client, png((200, 100)))[1])
    (kept,) = [event for event in told if event["kind"] == "kept"]
    left, top, right, bottom = kept["grids"][0]["box"]
    assert (left, right) == pytest.approx((0.25, 0.75), abs=0.02)
    assert (top, bottom) == pytest.approx((0, 1), abs=0.02)


# -------------------------------------------------------------------------------- refusals
def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb() -> bytes:
    """A small PNG that says it has 50,000 x 50,000 pixels."""
    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99)))


def large() -> bytes:
    """A small file of many pixels, below Pillow's own limits."""
    return png((1000, 1000))


REFUSED: dict[str, tuple[Callable[[], bytes | None], dict[str, str], int, str]] = {
    "no picture": (lambda: None, {}, 422, "there is no picture"),
    "not a picture": (lambda: b"GIF89a, or not", {}, 422, "not a picture"),
    "empty file": (lambda: b"", {}, 422, "not a picture"),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", {}, 422, "not a"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", {}, 422, "not a picture"),
    "truncated": (lambda: png()[:-80], {}, 422, "damaged or cut off"),
    "bomb": (bomb, {}, 422, "pixels; make it smaller"),
    "many pixels": (large, {}, 422, "1000x1000 pixels, more than 200000"),
    "a line": (lambda: png((300, 1)), {}, 422, "300x1 pixels, which is a line; crop it"),
    "too large": (lambda: png() + bytes(300_000), {}, 413, "larger than 0.2 MB"),
    "far too large": (lambda: bytes(2_000_000), {}, 413, "larger than 0.2 MB"),
    "long prompt": (png, {"prompt": "a" * 301}, 422, "301 characters, more than 300"),
    "empty prompt": (png, {"prompt": " \n "}, 422, "the question is empty"),
    "unknown method": (png, {"method": "visionzap"}, 422, "did you mean 'visionzip'"),
    "needs training": (png, {"method": "setok"}, 422, "method: unknown value"),
    "keep above": (png, {"keep": "1.2"}, 422, "keep: must be a fraction in (0, 1]"),
    "keep zero": (png, {"keep": "0"}, 422, "keep: must be a fraction"),
    "keep nan": (png, {"keep": "nan"}, 422, "keep: must be a fraction"),
    "keep a word": (png, {"keep": "much"}, 422, "keep: must be a number"),
    "long answer": (png, {"max_new_tokens": "33"}, 422, "1 to 32 tokens, not 33"),
    "no answer": (png, {"max_new_tokens": "0"}, 422, "1 to 32 tokens"),
    "odd answer": (png, {"max_new_tokens": "-1"}, 422, "must be a whole number"),
    "unknown field": (png, {"image": "/etc/passwd"}, 422, "a field that is not known"),
    "a field too many": (png, dict.fromkeys("abcdef", "1"), 400, "the form cannot be read"),
    "field too long": (png, {"prompt": "a" * 1_100_000}, 413, "larger than 0.2 MB"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_asked_is_refused_in_one_sentence(client: TestClient, name: str) -> None:
    picture, fields, expected, sentence = REFUSED[name]
    status, text = ask(client, picture(), **fields)
    assert status == expected, text
    assert sentence in text
    check_harmless(text)


def check_harmless(text: str) -> None:
    """Nothing of the server's inside is told."""
    for trace in ("Traceback", "File ", "/tmp", "/home", "itprune/", ".py", " at 0x", "BytesIO"):
        assert trace not in text


def test_a_budget_the_method_cannot_reach_is_told_in_the_stream(client: TestClient) -> None:
    status, text = ask(client, png(), method="fastv", keep="0.05")
    (error,) = [event["error"] for event in events(text) if event["kind"] == "error"]
    assert status == 200
    assert "0.05" in error
    assert events(text)[-1] == {"kind": "end"}
    check_harmless(text)


def test_other_types_addresses_and_verbs_are_refused(client: TestClient) -> None:
    assert client.post("/api/ask", content=b"{}").status_code == 415
    broken = {"content-type": "multipart/form-data; boundary=x"}
    response = client.post("/api/ask", content=b"--y\r\nno form", headers=broken)
    assert response.status_code in (400, 422)
    check_harmless(response.text)
    nameless = {"content-type": "multipart/form-data"}
    assert client.post("/api/ask", content=b"--y", headers=nameless).status_code == 400
    for path in ("/nothing", "/../pyproject.toml", "/static/app.js", "/%2e%2e/%2e%2e/etc/passwd"):
        assert client.get(path).status_code == 404
    assert client.get("/api/ask").status_code == 405
    assert client.post("/").status_code == 405
    assert "error" in client.get("/nothing").json()


def test_a_server_fault_is_told_without_its_trace(
    session: Session, monkeypatch: pytest.MonkeyPatch, client: TestClient
) -> None:
    def broken(ask: object) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(session, "check", broken)
    status, text = ask(client, png())
    assert status == 500
    assert "secret" not in text
    check_harmless(text)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:7860", "[::1]:9", "127.0.0.2"])
def test_this_machine_is_let_in(client: TestClient, host: str) -> None:
    assert client.get("/api/model", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "192.168.0.7", "127.0.0.1.evil.example", "[", ""])
def test_names_of_others_are_refused(client: TestClient, host: str) -> None:
    response = client.get("/api/model", headers={"host": host})
    assert response.status_code == 403
    assert response.headers["content-security-policy"] == POLICY


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://[::1"},
        {"origin": "http://127.0.0.1:1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_other_sites_cannot_ask(client: TestClient, headers: dict[str, str]) -> None:
    body, own = form(png())
    assert client.post("/api/ask", content=body, headers={**own, **headers}).status_code == 403


def test_its_own_page_can_ask(client: TestClient) -> None:
    body, own = form(png())
    headers = {**own, "origin": "http://127.0.0.1:7860", "sec-fetch-site": "same-origin"}
    assert client.post("/api/ask", content=body, headers=headers).status_code == 200
