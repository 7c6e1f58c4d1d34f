"""`itprune infer`: one question, files of them, and everything that can be wrong with either."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from itprune.answer import Answerer
from itprune.cli import main
from itprune.cli.answer_file import AnswerFile

FIGURES = {
    "answer",
    "finish",
    "tokens_out",
    "tokens_in",
    "visual_in",
    "tokens_stage1",
    "visual_stage1",
    "tokens_stage2",
    "visual_stage2",
    "layer_average",
    "visual_layer_average",
    "kv_entries",
    "kv_bytes",
    "prepare_s",
    "first_token_s",
    "total_s",
    "batch",
}
TIMES = ("prepare_s", "first_token_s", "total_s", "batch")
SHORT = ("--max-new-tokens", "5", "--device", "cpu")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that really reached a model."""
    sizes: list[int] = []
    answer = Answerer.answer
    monkeypatch.setattr(
        Answerer, "answer", lambda self, batch: sizes.append(len(batch)) or answer(self, batch)
    )
    return sizes


# -------------------------------------------------------------------------------- one question
def test_an_answer_and_its_cost(checkpoint: Path, pictures: Path, capsys: Any) -> None:
    ask = ["infer", "--model", str(checkpoint), "--prompt", "What colour?", *SHORT]
    ask += ["--image", str(pictures / "0.png"), "--image", str(pictures / "1.png")]
    assert main(ask) == 0
    plain = capsys.readouterr()
    assert main([*ask, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record.keys() == FIGURES
    assert plain.out == record["answer"] + "\n"
    assert record["visual_in"] == 32
    assert (
        f"visual tokens 32 -> {record['visual_stage1']} -> {record['visual_stage2']}" in plain.err
    )
    assert f"KV cache {record['kv_entries']} entries" in plain.err


@pytest.mark.parametrize(("terminal", "shown"), [(True, "\\x1b[2J"), (False, "\x1b[2J")])
def test_an_answer_does_not_steer_a_terminal(
    checkpoint: Path, monkeypatch: Any, capsys: Any, terminal: bool, shown: str
) -> None:
    answer = Answerer.answer
    monkeypatch.setattr(
        Answerer,
        "answer",
        lambda self, batch: [replace(a, answer="\x1b[2J") for a in answer(self, batch)],
    )
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert main(["infer", "--model", str(checkpoint), "--prompt", "blue?", *SHORT]) == 0
    assert capsys.readouterr().out == f"{shown}\n"


def test_keep_and_method_replace_those_of_the_checkpoint(
    checkpoint: Path, base: Path, pictures: Path, capsys: Any
) -> None:
    ask = ["--prompt", "What?", "--image", str(pictures / "0.png"), "--json", *SHORT]
    found = {}
    for name, options in {
        "dense": ["--model", str(checkpoint), "--keep", "1.0"],
        "control": ["--model", str(checkpoint), "--keep", "0.5", "--method", "uniform"],
        "ordinary": ["--model", str(base)],
        "ordinary pruned": ["--model", str(base), "--keep", "0.25", "--method", "random"],
    }.items():
        assert main(["infer", *options, *ask]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    assert [found[n]["visual_stage1"] for n in found] == [16, 8, 16, 4]
    assert timeless([found["dense"]]) == timeless([found["ordinary"]])


def test_a_prompt_from_stdin(checkpoint: Path, monkeypatch: Any, capsys: Any) -> None:
    answers = []
    for prompt in ("-", "green blue"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("green blue\n"))
        assert main(["infer", "--model", str(checkpoint), "--prompt", prompt, *SHORT]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


# ------------------------------------------------------------------------------------- a file
def file_command(checkpoint: Path, questions: Path, out: Path, *more: str) -> list[str]:
    files = ["--jsonl", str(questions), "--output", str(out)]
    return ["infer", "--model", str(checkpoint), *files, *SHORT, *more]


def test_a_file_is_answered_in_order(
    checkpoint: Path, questions: Path, tmp_path: Path, counted: list[int], capsys: Any
) -> None:
    out = tmp_path / "out.jsonl"
    assert main(file_command(checkpoint, questions, out, "--batch-size", "2")) == 0
    assert counted == [2, 2, 1]
    records = read(out)
    assert [r["line"] for r in records] == [1, 2, 3, 4, 5, 6, 7]
    assert [r.get("id") for r in records] == ["a", None, None, "text", "gone", None, "chat"]
    assert "not valid JSON" in records[2]["error"]
    assert "missing image" in records[4]["error"]
    told = capsys.readouterr().err
    assert "line 3: not valid JSON (Expecting property name" in told
    assert "2 line(s) could not be answered: 3, 5" in told
    alone = tmp_path / "alone.jsonl"
    assert main(file_command(checkpoint, questions, alone, "--batch-size", "1", "--quiet")) == 0
    assert timeless(read(alone)) == timeless(records)


@pytest.mark.parametrize("left", [0, 1, 3, 6])
def test_a_run_goes_on_where_it_stopped(
    checkpoint: Path, questions: Path, tmp_path: Path, counted: list[int], left: int
) -> None:
    out = tmp_path / "out.jsonl"
    command = file_command(checkpoint, questions, out, "--batch-size", "1")
    assert main(command) == 0
    whole = read(out)
    lines = out.read_text(encoding="utf-8").splitlines(keepends=True)
    out.write_text("".join(lines[:left]) + lines[left][:20], encoding="utf-8")  # cut in a line
    done = sum("answer" in r for r in whole[:left])
    counted.clear()
    assert main(command) == 0
    assert timeless(read(out)) == timeless(whole)
    assert len(counted) == 5 - done


def test_a_finished_run_loads_no_model(
    checkpoint: Path, questions: Path, tmp_path: Path, counted: list[int], monkeypatch: Any
) -> None:
    out = tmp_path / "out.jsonl"
    assert main(file_command(checkpoint, questions, out)) == 0
    before = out.read_bytes()
    monkeypatch.setattr("itprune.cli.infer.load", lambda args: pytest.fail("loaded"))
    assert main(file_command(checkpoint, questions, out)) == 0
    assert out.read_bytes() == before


def test_what_fails_midway_loses_nothing(
    checkpoint: Path, questions: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "out.jsonl"
    answer, calls = Answerer.answer, []

    def breaks(self: Answerer, batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(self, batch)

    monkeypatch.setattr(Answerer, "answer", breaks)
    command = file_command(checkpoint, questions, out, "--batch-size", "1")
    assert main(command) == 130
    assert [r["line"] for r in read(out)] == [1, 2]
    assert main(command) == 0
    assert [r["line"] for r in read(out)] == [1, 2, 3, 4, 5, 6, 7]


def test_one_question_of_a_batch_is_to_blame(
    checkpoint: Path, questions: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    answer = Answerer.answer

    def refuses_two(self: Answerer, batch: Any) -> Any:
        if any(len(encoded.inputs.get("pixel_values", ())) == 2 for encoded in batch):
            raise ValueError("two are too many")
        return answer(self, batch)

    monkeypatch.setattr(Answerer, "answer", refuses_two)
    out = tmp_path / "out.jsonl"
    assert main(file_command(checkpoint, questions, out)) == 0
    found = [r.get("error", "") == "two are too many" for r in read(out)]
    assert found == [False, True, False, False, False, False, False]


def test_other_settings_do_not_continue_a_file(
    checkpoint: Path, questions: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out.jsonl"
    assert main(file_command(checkpoint, questions, out)) == 0
    before = out.read_bytes()
    assert main(file_command(checkpoint, questions, out, "--keep", "1.0")) == 1
    assert "its answer to line 1 belongs to another question or other settings" in (
        capsys.readouterr().err
    )
    questions.write_text(questions.read_text().replace("What colour", "Which colour"))
    assert main(file_command(checkpoint, questions, out)) == 1
    assert out.read_bytes() == before


def test_retry_asks_failed_lines_again(
    checkpoint: Path, questions: Path, pictures: Path, tmp_path: Path, counted: list[int]
) -> None:
    out = tmp_path / "out.jsonl"
    assert main(file_command(checkpoint, questions, out)) == 0
    (tmp_path / "nowhere.png").symlink_to(pictures / "5.png")
    counted.clear()
    assert main(file_command(checkpoint, questions, out, "--retry")) == 0
    records = read(out)
    assert counted == [1]
    assert [r["line"] for r in records] == [1, 2, 3, 4, 5, 6, 7]
    assert ["error" in r for r in records] == [False, False, True, False, False, False, False]


def test_parts_of_an_interrupted_run_are_folded_in(
    checkpoint: Path, questions: Path, tmp_path: Path, counted: list[int]
) -> None:
    out = tmp_path / "out.jsonl"
    assert main(file_command(checkpoint, questions, out)) == 0
    whole = read(out)
    lines = out.read_text(encoding="utf-8").splitlines(keepends=True)
    out.write_text(lines[3], encoding="utf-8")
    (tmp_path / "out.jsonl.rank0").write_text(lines[0] + lines[6], encoding="utf-8")
    (tmp_path / "out.jsonl.rank1").write_text(lines[1] + lines[5][:30], encoding="utf-8")
    counted.clear()
    assert main(file_command(checkpoint, questions, out)) == 0
    assert timeless(read(out)) == timeless(whole)
    assert counted == [1]
    assert not list(tmp_path.glob("out.jsonl.*"))


def test_from_stdin_to_stdout(
    checkpoint: Path, questions: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    out = tmp_path / "out.jsonl"
    assert main(file_command(checkpoint, questions, out)) == 0
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO(questions.read_text(encoding="utf-8")))
    pipe = ["--jsonl", "-", "--image-root", str(tmp_path), "--quiet", *SHORT]
    assert main(["infer", "--model", str(checkpoint), *pipe]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert timeless(records) == timeless(read(out))


def test_a_full_disk_is_told(
    checkpoint: Path, questions: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def full(self: AnswerFile, record: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AnswerFile, "write", full)
    assert main(file_command(checkpoint, questions, tmp_path / "out.jsonl", "--quiet")) == 1
    assert "No space left on device; what was written stays" in capsys.readouterr().err


def test_nothing_answered_is_a_failure(checkpoint: Path, write_lines: Any, tmp_path: Path) -> None:
    lines = write_lines("{", {"prompt": ""}, {"prompt": "?", "image": "../../etc/passwd"})
    out = tmp_path / "out.jsonl"
    assert main(file_command(checkpoint, lines, out)) == 1
    assert [sorted(r) for r in read(out)] == [["error", "key", "line"]] * 3


# ---------------------------------------------------------------------------------- bad input
ONE = ["--prompt", "What?"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([*ONE, "--image", "no.png"], "missing image no.png"),
        ([*ONE, "--image", "{tmp}/text.png"], "unreadable image"),
        (["--prompt", "<image> and <image>", "--image", "{png}"], "2 <image> but 1 image"),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "red " * 600], "the model's context holds 512; shorten it"),
        ([*ONE, "--keep", "1.5"], "--keep: must be a fraction in (0, 1], got 1.5"),
        ([*ONE, "--keep", "0"], "--keep: must be a fraction in (0, 1], got 0.0"),
        ([*ONE, "--method", "randon"], "did you mean 'random'?"),
        ([*ONE, "--temperature", "-1"], "temperature: must be 0 or higher"),
        ([*ONE, "--output", "x"], "--output belongs to --jsonl"),
        ([], "give either --prompt (with any --image) or --jsonl"),
        ([*ONE, "--jsonl", "x"], "give either --prompt"),
        (["--jsonl", "{tmp}/no.jsonl"], "cannot be read (No such file or directory)"),
        (["--jsonl", "{tmp}/list.json"], "a JSON list, but --jsonl takes one object a line"),
        (["--jsonl", "{lines}", "--image", "x.png"], "--image belongs to --prompt"),
        (["--jsonl", "{lines}", "--batch-size", "0"], "--batch-size: must be at least 1"),
        (["--jsonl", "{lines}", "--image-root", "{tmp}/no"], "no such folder"),
        (["--jsonl", "{lines}", "--output", "{tmp}/no/out.jsonl"], "cannot be written (No such"),
        (["--jsonl", "{lines}", "--output", "{lines}"], "is the file of the questions"),
        (["--jsonl", "{lines}", "--output", "{tmp}/text.png"], "line 1 is not an answer of"),
        ([*ONE, "--model", "{tmp}/no"], "no such checkpoint folder"),
        ([*ONE, "--model", "{tmp}/empty"], "holds neither config.json nor adapter_config.json"),
        ([*ONE, "--model", "{tmp}/gpt2"], "model family 'gpt2' is not supported; supported: "),
        ([*ONE, "--model", "{tmp}/broken"], "config.json: not a model's configuration"),
        ([*ONE, "--model", "{tmp}/adapter"], "its base model ./base is not there"),
    ],
)
def test_bad_input_is_told_in_one_sentence(
    checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: Any,
    options: list[str],
    reason: str,
) -> None:
    (tmp_path / "text.png").write_text("no picture and no answers\n")
    (tmp_path / "list.json").write_text("[\n]")
    (tmp_path / "in.jsonl").write_text('{"prompt": "?"}\n')
    for name, file, text in (
        ("gpt2", "config.json", '{"model_type": "gpt2"}'),
        ("broken", "config.json", "{"),
        ("adapter", "adapter_config.json", '{"base_model_name_or_path": "./base"}'),
        ("empty", "notes.txt", ""),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    places = {"tmp": tmp_path, "png": pictures / "0.png", "lines": tmp_path / "in.jsonl"}
    filled = [option.format(**places) for option in options]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert main(["infer", "--model", str(checkpoint), *SHORT, *filled]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("itprune: error: ")
    assert told.err.count("\n") == 1
    assert reason in told.err
    assert all(path.read_bytes() == held for path, held in before.items())
