"""`itprune methods`: the table is the methods' own cards, and docs/methods.md shows the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from itprune.cli import main
from itprune.methods import method_class, methods

OURS = [name for name in methods() if method_class(name).__module__.startswith("itprune.")]
"""Other tests of this process register methods of their own."""
DOCS = Path(__file__).parents[2] / "docs" / "methods.md"


def told(capsys: Any, *options: str) -> str:
    assert main(["methods", *options]) == 0
    return capsys.readouterr().out


def fresh(*options: str) -> str:
    """What a process of its own prints."""
    command = [sys.executable, "-m", "itprune.cli", "methods", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_table_has_every_method_and_fits_a_terminal() -> None:
    lines = fresh().splitlines()
    assert max(map(len, lines)) <= 100
    rows = {line.split()[0]: line for line in lines[1:] if line}
    for name in OURS:
        card = method_class(name).card
        assert card.paper in rows[name]
        assert card.count in rows[name]
        assert card.training in rows[name]


@pytest.mark.parametrize("name", OURS)
def test_one_in_full(name: str, capsys: Any) -> None:
    text = told(capsys, name)
    card = method_class(name).card
    assert card.title
    assert max(map(len, text.splitlines())) <= 100
    words = text.split()
    assert [word for word in card.notes.split() if word not in words] == []
    assert "label_only_logits (default pruned)" in text


def test_options_have_defaults_and_docs(capsys: Any) -> None:
    assert "seed (default 0)" in told(capsys, "random")
    assert "min_text (default 25)" in told(capsys, "itprune")


def test_json(capsys: Any) -> None:
    facts = json.loads(fresh("--json"))
    assert [fact["method"] for fact in facts] == OURS
    own = json.loads(told(capsys, "itprune", "--json"))
    assert own["paper"] == "2409.01162"
    assert own["places"] == ["before_llm", "layers"]
    assert "llava" in own["families"]
    options = {option["option"]: option for option in own["options"]}
    assert options["stage2.min_text"]["default"] == 25
    assert all(option["doc"] for option in options.values())


def test_every_option_of_every_method_is_documented() -> None:
    for fact in json.loads(fresh("--json")):
        for option in fact["options"]:
            assert option["doc"], f"{fact['method']}.{option['option']} has no docstring"


def test_the_docs_show_the_same_table() -> None:
    table = fresh("--markdown")
    hint = "replace the table in docs/methods.md by what `itprune methods --markdown` prints"
    assert table in DOCS.read_text(encoding="utf-8"), hint


def test_an_unknown_name(capsys: Any) -> None:
    assert main(["methods", "fastvv"]) == 1
    assert "did you mean 'fastv'?" in capsys.readouterr().err
