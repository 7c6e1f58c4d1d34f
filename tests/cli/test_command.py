"""The command line itself: help for every command, one real process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from itprune.answer import Answer
from itprune.cli import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"itprune {command}" in capsys.readouterr().out


def test_as_a_real_command(checkpoint: Path, pictures: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "itprune.cli",
        "infer",
        "--model",
        str(checkpoint),
        "--max-new-tokens",
        "5",
    ]
    command += ["--json", "--image", str(pictures / "0.png"), "--prompt", "What colour?"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).keys() == Answer.__dataclass_fields__.keys()


def test_an_error_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", "--model", "a\x1b[2Jb", "--prompt", "what?"]) == 1
    err = capsys.readouterr().err
    assert "a\\x1b[2Jb: no such checkpoint folder" in err
    assert "\x1b" not in err
