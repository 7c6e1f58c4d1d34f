"""Questions: every layout is read, and what is wrong is told in one sentence."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from itprune import question as module
from itprune.question import ImageFolder, Question, open_image

PICTURE = Image.new("RGB", (4, 4))


def kinds(question: Question) -> list[list[str]]:
    return [[part["type"] for part in m["content"]] for m in question.messages]


def test_images_stand_before_a_prompt_without_places() -> None:
    assert kinds(Question.from_prompt("what?", [PICTURE] * 2)) == [["image", "image", "text"]]


def test_places_in_a_prompt_are_kept() -> None:
    question = Question.from_prompt("is <image>\nlike <image> ?", [PICTURE] * 2)
    assert kinds(question) == [["text", "image", "text", "image", "text"]]
    assert [p["text"] for p in question.messages[0]["content"] if "text" in p] == [
        "is",
        "like",
        "?",
    ]


def test_the_last_answer_of_a_record_is_left_out() -> None:
    turns = [
        {"from": "human", "value": "<image>\none?"},
        {"from": "gpt", "value": "1"},
        {"from": "human", "value": "two?"},
        {"from": "gpt", "value": "2"},
    ]
    record = {"image": "a.png", "conversations": turns}
    question = Question.from_record(record, lambda path: PICTURE)
    assert [m["role"] for m in question.messages] == ["user", "assistant", "user"]


def test_images_come_in_the_order_of_their_places() -> None:
    opened = []
    content = [
        {"type": "image"},
        {"type": "image", "image": "own.png"},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    record = {"messages": [{"role": "user", "content": content}], "images": ["x.png", "y.png"]}
    Question.from_record(record, lambda path: opened.append(path) or PICTURE)
    assert opened == ["x.png", "own.png", "y.png"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "must be a JSON object"),
        ({}, "needs one of prompt, messages, conversations"),
        ({"prompt": "a", "messages": []}, "has `prompt` and `messages`"),
        ({"prompt": 3}, "`prompt` must be text"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": "a \ud800 b"}, "half a character"),
        ({"prompt": "a <image> b"}, r"1 <image> but 0 image\(s\)"),
        ({"prompt": "<image> b", "images": ["a", "b"]}, r"1 <image> but 2 image\(s\)"),
        ({"prompt": "a", "image": 7}, "an image must be a path"),
        ({"messages": "hi"}, "must be a list of turns"),
        ({"messages": []}, "no user turn"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "unknown role 'robot'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "content item"),
        ({"messages": [{"role": "user", "content": "a"}], "image": "x"}, "0 <image> but 1"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "no user turn"),
        (
            {
                "image": "x",
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "<image> b"},
                    {"from": "human", "value": "c"},
                ],
            },
            "stands in an assistant turn",
        ),
        ({"conversations": [{"from": "human", "value": None}]}, "must be text"),
    ],
)
def test_bad_records(record: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Question.from_record(record, lambda path: PICTURE)


def test_words_of_two_items_stay_apart() -> None:
    items = [{"type": "text", "text": text} for text in (" What digit ", "is red? <image>", " b ")]
    question = Question.from_record(
        {"messages": [{"role": "user", "content": items}], "image": "a"}, lambda path: PICTURE
    )
    texts = [part.get("text") for part in question.messages[0]["content"]]
    assert texts == ["What digit ", "is red?", None, "b"]


def test_images_stay_in_their_folder(tmp_path: Path, pictures: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "outside.png").symlink_to(pictures / "0.png")
    (inside / "a.png").symlink_to(pictures / "0.png")
    open_in = ImageFolder(inside)
    assert open_in("a.png").mode == "RGB"
    assert open_in(str(inside / "a.png")).mode == "RGB"
    assert open_in("x/../a.png").mode == "RGB"
    for name in ("../outside.png", str(tmp_path / "outside.png"), "a/../../outside.png"):
        with pytest.raises(ValueError, match=r"lies outside .* --image-root"):
            open_in(name)
    with pytest.raises(ValueError, match="is an address"):
        open_in("https://example.org/a.png")


def test_unreadable_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing image"):
        open_image(tmp_path / "no.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"unreadable image .*text\.png"):
        open_image(tmp_path / "text.png")
    PICTURE.resize((300, 300)).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"unreadable image .*cut\.jpg"):
        open_image(tmp_path / "cut.jpg")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_photos_are_turned_as_they_were_taken(tmp_path: Path, kind: str) -> None:
    corner = Image.new("RGB", (24, 16), "white")
    corner.paste("black", (0, 0, 8, 8))
    for orientation in range(10):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        corner.save(tmp_path / "photo", kind, exif=exif)
        with Image.open(tmp_path / "photo") as photo:
            expected = ImageOps.exif_transpose(photo).convert("RGB")
        found = open_image(tmp_path / "photo")
        assert found.size == expected.size
        assert found.tobytes() == expected.tobytes()


def test_what_a_camera_wrote_wrongly_costs_no_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    PICTURE.save(tmp_path / "photo.jpg", exif=exif)
    whole = (tmp_path / "photo.jpg").read_bytes()
    start = whole.index(b"Exif")
    for length in range(6, len(exif.tobytes()) - 4):
        broken = bytearray(whole)
        broken[start + length : start + length + 4] = b"\xff\xff\xff\xff"
        (tmp_path / "photo.jpg").write_bytes(broken)
        assert sorted(open_image(tmp_path / "photo.jpg").size) == sorted(PICTURE.size)


@pytest.mark.parametrize("side", [10_000, 100_000])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path, side: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        code = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", code)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
    with pytest.raises(ValueError, match=r"pixels.*; make it smaller first"):
        open_image(bomb)
    assert side * side > module.MAX_PIXELS


@pytest.mark.parametrize("size", [(1, 201), (402, 2)])
def test_a_line_is_no_picture(tmp_path: Path, size: tuple[int, int]) -> None:
    """A processor that resizes the shorter side would make gigabytes of it."""
    Image.new("1", size).save(tmp_path / "line.png")
    with pytest.raises(ValueError, match="one side more than 200 times the other; crop it first"):
        open_image(tmp_path / "line.png")
    Image.new("1", (200, 1)).save(tmp_path / "thin.png")
    assert open_image(tmp_path / "thin.png").size == (200, 1)


@pytest.mark.parametrize(("kind", "order"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
def test_sixteen_bits_of_grey_are_scaled(kind: str, order: str) -> None:
    grey = np.linspace(0, 65535, 256).astype(order).reshape(16, 16)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, kind)
    seen = np.asarray(open_image(io.BytesIO(file.getvalue())))
    assert seen.shape == (16, 16, 3)
    assert (seen == np.arange(256).reshape(16, 16, 1)).all()


def test_whatever_a_decoder_raises_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.ppm").write_bytes(b"P6 4\xff0 5 255\n")  # ValueError
    odd = io.BytesIO()
    Image.new("RGBA", (8, 8)).save(odd, "DDS")
    whole = odd.getvalue()
    (tmp_path / "a.dds").write_bytes(whole[:80] + bytes(48) + whole[128:])  # NotImplementedError
    for name in ("a.ppm", "a.dds"):
        with pytest.raises(ValueError, match=rf"^unreadable image .*{name} \("):
            open_image(tmp_path / name)


def test_a_picture_that_is_a_program_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(ValueError, match=r"is a program \(EPS\), not a picture"):
        open_image(tmp_path / "a.jpg")
