"""Errors of files that all readers share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from itprune.records import read_json, read_records
from itprune.tasks.files import text_of


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r":1: not valid JSON"),
        (b'{"a":\n1,}', r":2: not valid JSON"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b"\x1f\x8b\x08", "is compressed; unpack it first"),
        (b"PK\x03\x04\xff", "is compressed; unpack it first"),
        (b"[" * 200_000, r":1: not valid JSON \(lists or objects too deep"),
        (b'{"a":' + b"9" * 10_000 + b"}", r":1: not valid JSON \(a number of too many digits"),
    ],
)
def test_json_that_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        read_json(path)
    with pytest.raises(ValueError, match=f"{path}.*{message}" if b"\n" not in content else ":1: "):
        read_records(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_json(tmp_path)


def test_json_with_a_mark_in_front_or_without_anything(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert read_json(path) == {"a": 1}
    assert read_records(path) == [{"a": 1}]
    path.write_bytes(b"\n")
    with pytest.raises(ValueError, match="is empty"):
        read_json(path)
    with pytest.raises(ValueError, match="holds no samples"):
        read_records(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "`a` is missing"), (True, "got bool"), ([1], "got list"), (1.5, "got float")],
)
def test_a_field_that_is_no_text(value: Any, message: str) -> None:
    assert text_of({"a": 5}, "a", "here") == "5"
    with pytest.raises(ValueError, match=f"here: .*{message}"):
        text_of({"a": value}, "a", "here")
