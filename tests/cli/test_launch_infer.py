"""launch/infer.py: a file shared by processes gives what one process gives."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from itprune.cli import main
from itprune.cli.answer_file import AnswerFile

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "infer.py"
TIMES = ("prepare_s", "first_token_s", "total_s", "batch")
SHORT = ("--max-new-tokens", "5", "--device", "cpu", "--batch-size", "1", "--quiet")


@pytest.fixture(scope="module")
def launcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch_infer", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def options(checkpoint: Path, questions: Path, out: Path) -> list[str]:
    return ["--model", str(checkpoint), "--jsonl", str(questions), "--output", str(out), *SHORT]


def test_every_line_has_one_process(launcher: ModuleType) -> None:
    lines = list(range(23))
    shares = [list(launcher.share(lines, 4, rank, 3)) for rank in range(3)]
    assert sorted(line for part in shares for line in part) == lines
    assert shares[1] == [4, 5, 6, 7, 16, 17, 18, 19]


def test_one_process_gives_what_the_command_gives(
    launcher: ModuleType, checkpoint: Path, questions: Path, tmp_path: Path
) -> None:
    assert launcher.main(options(checkpoint, questions, tmp_path / "launched.jsonl")) == 0
    assert main(["infer", *options(checkpoint, questions, tmp_path / "plain.jsonl")]) == 0
    assert read(tmp_path / "launched.jsonl") == read(tmp_path / "plain.jsonl")
    assert not list(tmp_path.glob("*.rank*"))


def test_a_process_that_fails_leaves_its_part(
    launcher: ModuleType, checkpoint: Path, questions: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    out, write = tmp_path / "out.jsonl", AnswerFile.write

    def breaks(self: AnswerFile, record: dict[str, Any]) -> None:
        if record["line"] == 4:
            raise RuntimeError("no more")
        write(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "write", breaks)
        with pytest.raises(RuntimeError, match="no more"):
            launcher.main(options(checkpoint, questions, out))
    assert [r["line"] for r in read(tmp_path / "out.jsonl.rank0")] == [1, 2, 3]
    assert launcher.main(options(checkpoint, questions, out)) == 0
    assert [r["line"] for r in read(out)] == [1, 2, 3, 4, 5, 6, 7]


def test_it_needs_files(launcher: ModuleType, checkpoint: Path, capsys: Any) -> None:
    assert launcher.main(["--model", str(checkpoint), "--jsonl", "-", "--output", "x"]) == 1
    assert "give --jsonl and --output as files" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_give_what_one_gives(
    checkpoint: Path, questions: Path, tmp_path: Path
) -> None:
    assert main(["infer", *options(checkpoint, questions, tmp_path / "one.jsonl")]) == 0
    config = ROOT / "launch" / "accelerate" / "cpu2.yaml"
    out = tmp_path / "two.jsonl"
    lines = (tmp_path / "one.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path(f"{out}.rank5").write_text(lines[1], encoding="utf-8")  # of a run with more processes
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += [str(SCRIPT), *options(checkpoint, questions, out)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert read(out) == read(tmp_path / "one.jsonl")
    assert "2 line(s) could not be answered: 3, 5" in done.stderr
    assert not list(tmp_path.glob("two.jsonl.*"))
