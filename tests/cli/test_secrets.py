"""Keys of servers: from a file, or from a variable."""

from __future__ import annotations

from pathlib import Path

import pytest

from itprune.cli import secrets, serve

NAME = "ITPRUNE_TEST_KEY"


def test_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NAME, raising=False)
    assert secrets.of_variable(NAME) is None
    monkeypatch.setenv(NAME, " a-long-secret\n")
    assert secrets.of_variable(NAME) == "a-long-secret"


@pytest.mark.parametrize(
    ("value", "words"),
    [("", "is empty"), (" \n", "is empty"), ("a secret", "no spaces"), ("sécret", "plain letters")],
)
def test_what_is_no_key(value: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, value)
    with pytest.raises(ValueError, match=f"^{NAME}: .*{words}") as error:
        secrets.of_variable(NAME)
    assert "cret" not in str(error.value)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"\xef\xbb\xbffirst\r\n# of the team\n  # and this\n\n second \n")
    assert secrets.of_file("--keys", path) == ("first", "second")
    for data, words in (
        (b"", "holds no key"),
        (b"# none\n", "holds no key"),
        (b"a b", "no spaces"),
        (b"a\x1bb", "plain letters"),
        (b"\xff", "cannot be read"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"^--keys .*{words}"):
            secrets.of_file("--keys", path)
    with pytest.raises(ValueError, match="cannot be read"):
        secrets.of_file("--keys", tmp_path)


def test_keys_of_the_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serve.KEY, raising=False)
    path = tmp_path / "keys"
    path.write_text("first-secret\nsecond-secret\n")
    assert serve.read_keys(None) == ()
    assert serve.read_keys(path) == ("first-secret", "second-secret")
    monkeypatch.setenv(serve.KEY, "third-secret")
    assert serve.read_keys(path) == ("third-secret", "first-secret", "second-secret")
    assert serve.read_keys(None) == ("third-secret",)
