"""Files written in one step."""

from __future__ import annotations

from pathlib import Path

import pytest

from itprune.writing import replace_text


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    replace_text(path, "one")
    replace_text(path, "two \u00e9 \ud800")
    assert path.read_text(encoding="utf-8") == "two \u00e9 \\ud800"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(OSError, match="directory"):
        replace_text(tmp_path / "a.txt", "one")
    with pytest.raises(OSError, match="No such file"):
        replace_text(tmp_path / "none" / "a.txt", "one")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
