"""What the command refuses, each in one sentence and before it writes anything."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.inspecting.conftest import MODEL, inspect


def header_bomb(path: Path) -> None:
    """A PNG whose header promises 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def one_sentence(error: pytest.ExceptionInfo[ValueError]) -> str:
    said = str(error.value)
    assert "\n" not in said
    assert "Traceback" not in said
    return said


@pytest.fixture
def ask(tmp_path: Path, pictures: list[Path]) -> Any:
    """Runs the command on one picture; options given replace the usual ones."""

    def run(**changes: Any) -> int:
        options = {
            "model": MODEL,
            "image": pictures[0],
            "prompt": "Which?",
            "output": tmp_path / "out",
            "max-new-tokens": 2,
            **changes,
        }
        words = [(f"--{k.replace('_', '-')}", v) for k, v in options.items() if v is not None]
        return inspect(*(word for pair in words for word in pair))

    return run


def test_pictures_that_are_none(ask: Any, tmp_path: Path, pictures: list[Path]) -> None:
    text, cut, bomb = (tmp_path / name for name in ("text.png", "cut.png", "bomb.png"))
    text.write_text("no picture")
    cut.write_bytes(pictures[0].read_bytes()[:-40])
    header_bomb(bomb)
    cases = [
        (text, "unreadable image"),
        (cut, "unreadable image"),
        (bomb, "more than .* pixels"),
        (tmp_path / "none.png", "missing image"),
        (tmp_path, "missing image"),
    ]
    for path, said in cases:
        with pytest.raises(ValueError, match=said) as error:
            ask(image=path)
        assert str(path) in one_sentence(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("word " * 5000, "the model's context holds"),
        ("<image> and <image>", "has 2 <image> but 1 image"),
        ("", "the prompt is empty"),
        ("  \n", "the prompt is empty"),
        ("<image>", "the prompt is empty"),
    ],
)
def test_prompts_that_cannot_be_asked(ask: Any, prompt: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said) as error:
        ask(prompt=prompt)
    one_sentence(error)
    assert not (tmp_path / "out").exists()


def test_an_image_place_in_a_prompt_is_a_place(ask: Any, tmp_path: Path) -> None:
    assert ask(prompt="What is in <image> here?") == 0
    figures = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert figures["questions"][0]["visual_tokens"][0] == 144


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": None}, "do not make pairs"),
        ({"image": None}, "give --image and --prompt"),
        ({"data": "val.json"}, "either --data or pairs"),
        ({"image": None, "prompt": None, "data": "none.json"}, "cannot be read"),
        ({"image": None, "prompt": None, "data": "x.json", "limit": 0}, "--limit"),
        ({"image": None, "prompt": None, "data": "x", "image-root": "/no/where"}, "--image-root"),
        ({"max-new-tokens": 0}, "max.new.tokens"),
        ({"keep": 1.5}, "--keep"),
        ({"method": "vision"}, "--method"),
        ({"model": "/no/where"}, "no such checkpoint folder"),
        ({"device": "cuda:99"}, "cuda:99"),
    ],
)
def test_options_that_cannot_work(ask: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        ask(**changes)
    one_sentence(error)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "Which?", "image": "none.png"}, "record 2: missing image"),
        ({"prompt": "Which?", "image": "../../secret.png"}, "record 2: .*lies outside"),
        ({"prompt": "Which?", "image": "https://a.b/c.png"}, "record 2: .*is an address"),
        ({"prompt": 3}, "record 2: `prompt` must be text"),
        ("text", "record 2: a record must be a JSON object"),
    ],
)
def test_records_that_cannot_be_asked(
    ask: Any, record: Any, said: str, pictures: list[Path]
) -> None:
    data = pictures[0].parent / "bad.json"
    data.write_text(json.dumps([{"prompt": "Which?", "image": "0.png"}, record]))
    with pytest.raises(ValueError, match=said) as error:
        ask(image=None, prompt=None, data=data)
    assert str(data) in one_sentence(error)


def test_a_name_that_is_no_text(ask: Any, tmp_path: Path, pictures: list[Path]) -> None:
    strange = tmp_path / "a\udcff.png"
    strange.write_bytes(pictures[0].read_bytes())
    assert ask(image=strange) == 0
    assert "a?.png" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_one_prompt_for_all_pictures(tmp_path: Path, pictures: list[Path]) -> None:
    given = [word for path in pictures for word in ("--image", path)]
    common = ("--model", MODEL, "--max-new-tokens", 2, "--output", tmp_path / "out")
    assert inspect(*common, *given, "--prompt", "Which?") == 0
    with pytest.raises(ValueError, match="2 --image and 3 --prompt do not make pairs"):
        inspect(*common, *given, *("--prompt", "Which?") * 3)


# ------------------------------------------------------------------------------------ the folder
def test_a_folder_of_others_is_refused(ask: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "index.html").write_text("mine")
    with pytest.raises(ValueError, match="did not write") as error:
        ask()
    one_sentence(error)
    assert (out / "index.html").read_text() == "mine"
    (out / "inspect.json").write_text("[1]")
    with pytest.raises(ValueError, match="did not write"):
        ask()
    with pytest.raises(ValueError, match="is a file"):
        ask(output=out / "index.html")


def test_our_own_folder_is_replaced_and_nothing_else_in_it(
    ask: Any, tmp_path: Path, pictures: list[Path]
) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder will do
    assert ask() == 0
    (out / "notes.txt").write_text("mine")
    (out / "kept-009-layer0.png").write_bytes(b"old")
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"theirs")
    (out / "kept-001.png").unlink()
    (out / "kept-001.png").symlink_to(outside)
    assert ask(image=pictures[1]) == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "kept-009-layer0.png").exists()
    assert outside.read_bytes() == b"theirs"
    assert not (out / "kept-001.png").is_symlink()


def test_a_folder_that_cannot_be_made(ask: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        ask(output=tmp_path / "file" / "out")


def test_a_call_that_failed_half_way_can_be_repeated(
    ask: Any, tmp_path: Path, pictures: list[Path]
) -> None:
    data = pictures[0].parent / "half.json"
    good = {"prompt": "Which?", "image": "0.png"}
    data.write_text(json.dumps([good, {**good, "image": "none.png"}]))
    with pytest.raises(ValueError, match="missing image"):
        ask(image=None, prompt=None, data=data)
    assert not (tmp_path / "out" / "index.html").exists()
    data.write_text(json.dumps([good]))
    assert ask(image=None, prompt=None, data=data) == 0
