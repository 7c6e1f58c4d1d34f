"""Readers: every layout becomes the same sample, and every fault has its sentence."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from itprune.question import IMAGE, MAX_PIXELS
from tests.train.helpers import turn
from train.data.dataset import read_records
from train.data.files import CHUNK
from train.data.images import MAX_DATA, ImageOpener
from train.data.llava import LlavaRecords, llava_sample
from train.data.messages import JsonlRecords, record_sample
from train.data.sample import BadSample, LostSource, Sample, Turn
from train.data.tar import TarPart
from train.recipe.sections import DataSection

ASKED = [turn("human", "<image>\nWhat?"), turn("gpt", "A dog.")]


def test_llava_and_messages_give_the_same_sample() -> None:
    llava = llava_sample({"id": "1", "image": "a.png", "conversations": ASKED})
    text = record_sample(
        {
            "images": ["a.png"],
            "messages": [
                {"role": "user", "content": "<image>\nWhat?"},
                {"role": "assistant", "content": "A dog."},
            ],
        }
    )
    typed = record_sample(
        {
            "images": ["a.png"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
            ],
        }
    )
    turns = (Turn("user", (IMAGE, "What?")), Turn("assistant", ("A dog.",)))
    assert llava == text == typed == Sample(turns, ("a.png",))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"conversations": ASKED}, "1 <image> in the text but 0 images"),
        ({"image": ["a", "b"], "conversations": ASKED}, "1 <image> in the text but 2 images"),
        ({"conversations": []}, "conversation is empty"),
        ({}, "must be a list"),
        ({"conversations": [turn("human", "Hi")]}, "no assistant turn"),
        ({"conversations": [turn("human", "Hi"), turn("gpt", " ")]}, "assistant turn is empty"),
        ({"conversations": [turn("human", "Hi"), turn("gpt", "<image>")]}, "assistant turn"),
        ({"conversations": [turn("robot", "Hi")]}, "unknown role 'robot'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "must be text, got int"),
        ([], "must be an object"),
    ],
)
def test_a_bad_record_says_why(record: object, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        llava_sample(record)


def test_llava_file_is_read_record_by_record(tmp_path: Path) -> None:
    records = [{"id": "é", "conversations": [turn("human", "a"), turn("gpt", f"ü{i}")]}
               for i in range(3)]  # fmt: skip
    path = tmp_path / "d.json"
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False))
    read = LlavaRecords(path)
    assert len(read) == 3
    assert [read.sample(i).turns[1].parts for i in (2, 0)] == [("ü2",), ("ü0",)]
    path.write_text("[ ]")
    assert len(LlavaRecords(path)) == 0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('[\n{"id": 1},\n{"id": }\n]', r"d.json:3: not valid JSON"),
        ('[\n{"id": 1}\n{"id": 2}]', r"d.json:3: not valid JSON \(expected , or \]\)"),
        ('[\n{"id": 1}', r"d.json:2: not valid JSON"),
        ('[{"id": 1}]\n7', r"d.json:\d: not valid JSON \(text after"),
        ('{"id": 1}', "must be one JSON list"),
        ("", "must be one JSON list"),
    ],
)
def test_a_syntax_error_names_its_line(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        LlavaRecords(path)


def test_a_broken_line_of_jsonl_is_one_bad_sample(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    good = json.dumps({"messages": [{"role": "user", "content": "a"},
                                    {"role": "assistant", "content": "b"}]})  # fmt: skip
    path.write_text(f"{good}\n\n{{broken\n{good}\n")
    records = JsonlRecords(path)
    assert len(records) == 3
    assert records.where(1) == f"{path}:3"
    with pytest.raises(BadSample, match="not valid JSON"):
        records.sample(1)
    assert records.sample(2).images == ()


def test_half_a_character_and_endless_numbers_are_bad_samples(tmp_path: Path) -> None:
    for content in ("cut \ud83d", [{"type": "text", "text": "cut \ud83d"}]):
        asked = {"role": "user", "content": content}
        with pytest.raises(BadSample, match="half a character"):
            record_sample({"messages": [asked, {"role": "assistant", "content": "b"}]})
    path = tmp_path / "d.jsonl"
    path.write_text('{"id": ' + "1" * 5000 + "}")
    with pytest.raises(BadSample, match="a number is too long"):
        JsonlRecords(path).sample(0)
    (tmp_path / "d.json").write_text('[{"id": ' + "1" * 5000 + "}]")
    with pytest.raises(ValueError, match=r"d\.json:1: not valid JSON \(a number is too long"):
        LlavaRecords(tmp_path / "d.json")


def test_a_llava_file_larger_than_what_is_held_of_it(tmp_path: Path) -> None:
    records = []
    for i in range(12_000):
        asked, said = "é\\" * (i % 299), f"ü{i} " + "\U0001f600" * (i % 77)
        turns = [turn("human", asked), turn("gpt", said)]
        records.append({"n": [1.5e3, None, "]},{"], "conversations": turns})
    path = tmp_path / "d.json"
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False) + " \n")
    assert path.stat().st_size > 2 * CHUNK
    read = LlavaRecords(path)
    assert len(read) == len(records)
    for i in (0, 1, 4321, 11_999):
        assert read.sample(i) == llava_sample(records[i])
    text = path.read_text()
    place = text.rindex('"n"')
    path.write_text(text[:place] + '"n' + text[place + 3 :])
    with pytest.raises(ValueError, match=rf":{text.count(chr(10), 0, place) + 1}: not valid JSON"):
        LlavaRecords(path)
    path.write_bytes(b'[{"id": "\xff"}]')
    with pytest.raises(ValueError, match="not UTF-8 text"):
        LlavaRecords(path)


def test_lines_of_every_kind_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "é" * 99},
                                    {"role": "assistant", "content": "b"}]})  # fmt: skip
    path = tmp_path / "d.jsonl"
    path.write_bytes(f"\ufeff{good}\r\n \t\r\n\n{good}\n{{}}\n  {good}".encode() + b"\n\xff\n")
    records = JsonlRecords(path)
    places = [int(records.where(i).rpartition(":")[2]) for i in range(len(records))]
    assert places == [1, 4, 5, 6, 7]
    assert records.sample(0) == records.sample(1) == records.sample(3)
    for index, reason in ((2, "neither"), (4, "not UTF-8 text")):
        with pytest.raises(BadSample, match=reason):
            records.sample(index)
    (tmp_path / "e.jsonl").write_text("")
    assert len(JsonlRecords(tmp_path / "e.jsonl")) == 0


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_workers_read_a_file_and_see_that_it_changed(tmp_path: Path, kind: str) -> None:
    record = {"conversations": [turn("human", "a"), turn("gpt", "b" * 99)]}
    path = tmp_path / f"d.{kind}"
    path.write_text(json.dumps([record] * 3) if kind == "json" else f"{json.dumps(record)}\n" * 3)
    records = read_records(str(path), DataSection(train=("x",)))
    far = pickle.loads(pickle.dumps(records))  # as a worker that is spawned gets it
    assert far.sample(2) == records.sample(2) == llava_sample(record)
    assert far.where(2) == records.where(2)
    with path.open("a") as file:
        file.write("\n")
    for opened in (records, far, pickle.loads(pickle.dumps(records))):
        with pytest.raises(LostSource, match=rf"d.{kind}: has changed since this run opened it"):
            opened.sample(0)


def test_datasets_folders_and_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {
        "messages": [[{"role": "user", "content": "<image> a"},
                      {"role": "assistant", "content": "b"}]] * 2,
        "images": [["x.png"], ["y.png"]],
    }  # fmt: skip
    table = datasets.Dataset.from_dict(rows)
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "t.parquet")
    for name in ("saved", "t.parquet"):
        records = read_records(str(tmp_path / name), DataSection(train=("x",)))
        assert len(records) == 2
        assert records.sample(1).images == ("y.png",)
        assert records.sample(1).turns[0].parts == (IMAGE, "a")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match="needs a column `messages`"):
        read_records(str(tmp_path / "other"), DataSection(train=("x",)))


def test_a_wrong_path_is_one_sentence(tmp_path: Path) -> None:
    for name in ("no.json", "no.jsonl", "no.parquet", "no.txt"):
        with pytest.raises(ValueError, match="no such data file"):
            read_records(str(tmp_path / name), DataSection(train=("x",)))


def test_images_stay_in_their_folder(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    Image.new("L", (3, 2)).save(root / "a.png")
    Image.new("RGB", (3, 2)).save(tmp_path / "b.png")
    opener = ImageOpener(root, strict=True)
    assert opener("a.png").mode == "RGB"
    assert opener("x/../a.png").size == (3, 2)
    for name, reason in [
        ("../b.png", "leaves"),
        ("x/../../b.png", "leaves"),
        (str(tmp_path / "b.png"), "absolute"),
        ("http://host/a.png", "download it first"),
        ("none.png", "missing image"),
    ]:
        with pytest.raises(BadSample, match=reason):
            opener(name)
    assert ImageOpener(root, strict=False)(str(tmp_path / "b.png")).size == (3, 2)


def test_unreadable_and_enormous_images_are_refused(tmp_path: Path) -> None:
    opener = ImageOpener(tmp_path, strict=True)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(BadSample, match="unreadable image"):
        opener("broken.png")
    Image.new("1", (10_000, MAX_PIXELS // 10_000 + 1)).save(tmp_path / "bomb.png")
    with pytest.raises(BadSample, match="pixels, more than"):
        opener("bomb.png")
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(BadSample, match="unreadable image"):
        opener("cut.png")
    odd = io.BytesIO()  # whose decoder raises what is no OSError
    Image.new("RGBA", (8, 8)).save(odd, "DDS")
    with pytest.raises(BadSample, match="unreadable image"):
        opener(odd.getvalue()[:80] + bytes(48) + odd.getvalue()[128:])
    with pytest.raises(BadSample, match="is no path"):
        opener("iVBORw0KGgo" * 100)  # base64 without its address
    assert opener(whole.read_bytes()).size == (64, 64)
    assert opener({"bytes": None, "path": "whole.png"}).size == (64, 64)


def test_no_program_of_the_data_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {ran}\nexit 1\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # not looked for yet
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(BadSample, match=r"is a program \(EPS\)"):
        ImageOpener(tmp_path, strict=True)("a.jpg")
    assert not ran.exists()


def test_an_address_that_carries_its_data_is_read(tmp_path: Path) -> None:
    opener = ImageOpener(tmp_path, strict=True)
    data = io.BytesIO()
    Image.new("RGB", (5, 4)).save(data, "PNG")
    address = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    assert opener(address).size == (5, 4)
    for broken, reason in [
        ("data:image/png;base64", "is no data:image"),
        ("data:image/png,abc", "is no data:image"),
        ("data:image/png;base64,a*b=", "is not valid base64"),
        (address[:60], "unreadable image|not valid base64"),
        ("data:image/png;base64," + "A" * (MAX_DATA + 4), "more than"),
    ]:
        with pytest.raises(BadSample, match=reason):
            opener(broken)


def test_an_image_column_stays_undecoded(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = io.BytesIO()
    Image.new("RGB", (7, 6)).save(data, "PNG")
    asked = [{"role": "user", "content": "<image> a"}, {"role": "assistant", "content": "b"}]
    rows = {"messages": [asked], "images": [[{"bytes": data.getvalue(), "path": None}]]}
    features = datasets.Features(
        {
            "messages": datasets.List({"role": datasets.Value("string"),
                                       "content": datasets.Value("string")}),
            "images": datasets.List(datasets.Image()),
        }
    )  # fmt: skip
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
    records = read_records(str(tmp_path / "t.parquet"), DataSection(train=("x",)))
    (image,) = records.sample(0).images
    assert isinstance(image["bytes"], bytes)
    assert ImageOpener(tmp_path, strict=True)(image).size == (7, 6)


@pytest.mark.parametrize("harm", ["cut", "header", "size", "sparse", None])
def test_what_is_lost_of_a_shard_is_told(tmp_path: Path, harm: str | None) -> None:
    path, content = tmp_path / "a.tar", json.dumps({"conversations": []}).encode()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("first", "second"):
            member = tarfile.TarInfo(f"{name}.json")
            member.size = len(content)
            if harm == "sparse" and name == "second":
                member.pax_headers = {"GNU.sparse.map": "0,10", "GNU.sparse.size": str(2**42)}
            archive.addfile(member, io.BytesIO(content))
    data = bytearray(path.read_bytes())
    if harm == "cut":
        del data[1024:]
    if harm == "header":
        data[1024 + 148 : 1024 + 156] = b"x" * 8
    if harm == "size":
        data[1024 + 124 : 1024 + 136] = b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7
        header = bytes(data[1024 : 1024 + 148]) + b" " * 8 + bytes(data[1024 + 156 : 1536])
        data[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(header)
    path.write_bytes(data)
    found = []
    for ticket in TarPart(path).tickets():
        with pytest.raises(BadSample) as caught:
            ticket().sample()
        found.append("archive ends" in str(caught.value))
    assert found == {None: [False, False], "sparse": [False]}.get(harm, [False, True])
