"""`itprune eval` as a whole: what is measured, resumed, left out and refused."""

from __future__ import annotations

import csv
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from itprune import load_pretrained
from itprune.answer import Answerer
from itprune.cli import eval as command
from itprune.decoding import Decoding
from itprune.evaluating import asking
from itprune.evaluating.settings import Team
from itprune.question import Question, open_image
from tests.evaluating.conftest import MODEL, SMALL, case_file, parse, read, rows

Evaluate = Callable[..., int]


# ------------------------------------------------------------------------------------ the whole
def test_the_own_method_dense_and_the_controls_are_measured(
    evaluate: Evaluate, tmp_path: Path, capsys: Any
) -> None:
    assert evaluate("--keep", "0.5,0.25") == 0
    told = capsys.readouterr().out
    found = rows(tmp_path)
    names = ("random", "downsample", "topk_cls")
    assert set(found) == {("dense", 1.0), *((n, k) for n in names for k in (0.25, 0.5))}
    dense = found["dense", 1.0]
    assert dense["value"] == dense["low"] == dense["high"] == 1.0  # it made the answers
    assert dense["difference"] == dense["difference_low"] == dense["difference_high"] == 0.0
    assert dense["layer_average"] == dense["kv_ratio"] == dense["speedup"] == 1.0
    half = found["topk_cls", 0.5]
    assert half["visual_llm"] == 72
    assert half["low"] <= half["value"] <= half["high"]
    assert half["difference"] == half["value"] - 1
    assert half["answers_per_s"] > 0
    assert half["kinds"].keys() == {"colour", "count"}
    assert sum(kind["items"] for kind in half["kinds"].values()) == half["items"] == 18

    said = read(case_file(tmp_path, "topk_cls-0.5"))
    assert half["value"] == sum(record["score"] for record in said) / len(said)
    assert half["kv_entries"] == sum(record["kv_entries"] for record in said) / len(said)
    for name in ("eval.json", "eval.csv", "eval.md", "pareto.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert "| `topk_cls`" in told
    assert (tmp_path / "out" / "eval.md").read_text().strip() in told
    with (tmp_path / "out" / "eval.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(found) * 3  # a line, and one for each kind
    assert {line["kind"] for line in lines} == {"", "colour", "count"}


def test_a_case_answers_as_infer_does_and_every_answer_is_kept(
    evaluate: Evaluate, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    assert evaluate("--keep", "0.25", "--limit", "6") == 0
    answerer = Answerer(
        load_pretrained(checkpoint, keep=0.25, device="cpu"), Decoding(max_new_tokens=4)
    )
    records = {record["id"]: record for record in json.loads(data.read_text())}
    said = read(case_file(tmp_path, "topk_cls-0.25"))
    assert len(said) == 6
    for one in said:
        record = records[one["id"]]
        question = Question.from_record(record, lambda name: open_image(data.parent / name))
        answer = answerer([question])[0]
        assert one["answer"] == answer.answer
        assert one["kv_entries"] == answer.kv_entries
        assert one["references"] == [record["answer"]]
        assert one["kind"] == record["kind"]
        assert one["score"] in (0.0, 1.0)


def test_without_a_pruner_the_method_is_itprune_calibrated_apart(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    assert evaluate("--keep", "0.3", model=MODEL) == 0
    assert ("itprune", 0.3) in rows(tmp_path)
    (head,) = (tmp_path / "out" / "answers").glob("*/itprune-0.3.case.json")
    assert json.loads(head.read_text())["calibration"]["samples"] == 6
    scored = {record["id"].split("-")[0] for record in read(case_file(tmp_path, "dense"))}
    assert len(scored) == 9  # three of twelve pictures, with both their questions, are apart


def test_other_data_to_calibrate_on_leaves_every_question_to_score(
    evaluate: Evaluate, data: Path, tmp_path: Path
) -> None:
    other = ("--calibration-data", str(data), "--calibration", "5", "--methods", "itprune")
    assert evaluate("--keep", "0.3", *other) == 0
    assert rows(tmp_path)["itprune", 0.3]["items"] == 24
    (run,) = json.loads((tmp_path / "out" / "eval.json").read_text())["runs"]
    assert run["calibration"] == 5


def test_a_method_that_does_not_fit_is_a_row_with_its_reason(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    assert evaluate("--keep", "0.2", "--methods", "fastv,quecc", "--limit", "2") == 0
    found = rows(tmp_path)
    assert "lowest" in found["fastv", 0.2]["reason"]
    assert found["quecc", 0.2]["reason"].startswith("needs training")
    assert found["quecc", 0.2]["value"] is None
    assert "needs training" in (tmp_path / "out" / "eval.md").read_text()


def test_a_method_that_fails_while_it_answers_is_left_out_and_dense_is_not(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Answerer.answer

    def breaks(self: Answerer, batch: Any) -> Any:
        attached = self.loaded.attached
        if attached is not None and attached.config.method == broken:
            raise ValueError("the device's memory does not hold it")
        return answer(self, batch)

    monkeypatch.setattr(Answerer, "answer", breaks)
    broken = "topk_cls"
    assert evaluate("--keep", "0.5", "--limit", "2") == 0
    assert rows(tmp_path)["topk_cls", 0.5]["reason"] == "the device's memory does not hold it"
    assert rows(tmp_path)["random", 0.5]["value"] is not None
    broken = "dense"
    with pytest.raises(ValueError, match="does not hold it"):
        evaluate("--keep", "0.5", "--limit", "3")
    monkeypatch.undo()
    assert evaluate("--keep", "0.5", "--limit", "2", "--retry") == 0
    assert rows(tmp_path)["topk_cls", 0.5]["value"] is not None


# ---------------------------------------------------------------------------------- resuming
def test_a_second_call_asks_only_what_is_missing(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate("--keep", "0.5") == 0
    before = case_file(tmp_path, "topk_cls-0.5").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(command, "load_as_saved", lambda args: pytest.fail("nothing is left to ask"))
        assert evaluate("--keep", "0.5") == 0
    assert case_file(tmp_path, "topk_cls-0.5").read_bytes() == before

    asked: list[str] = []
    ask = asking.ask

    def spy(subject: Any, answers: Any, *rest: Any) -> None:
        asked.append(answers.case.name)
        ask(subject, answers, *rest)

    monkeypatch.setattr("itprune.evaluating.run.ask", spy)
    assert evaluate("--keep", "0.25", "--methods", "uniform") == 0
    assert asked == ["random at 0.25, seed 0", "downsample at 0.25", "uniform at 0.25"]
    assert ("topk_cls", 0.5) in rows(tmp_path)  # lines of the first call stay


def test_a_killed_run_goes_on_where_it_was(evaluate: Evaluate, tmp_path: Path) -> None:
    assert evaluate("--keep", "0.5") == 0
    path = case_file(tmp_path, "topk_cls-0.5")
    whole, found = read(path), rows(tmp_path)["topk_cls", 0.5]
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.unlink()
    # Two processes were at work; one was killed in the middle of a line.
    path.with_name(f"{path.name}.rank0").write_text("".join(lines[:4]) + lines[4][:20])
    path.with_name(f"{path.name}.rank7").write_text("".join(lines[8:12]))
    assert evaluate("--keep", "0.5") == 0
    assert read(path) == whole
    assert not list(path.parent.glob("*.rank*"))
    again = rows(tmp_path)["topk_cls", 0.5]
    assert {k: v for k, v in again.items() if k not in ("answers_per_s", "speedup")} == {
        k: v for k, v in found.items() if k not in ("answers_per_s", "speedup")
    }


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_gives_the_same_answers(
    evaluate: Evaluate,
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert evaluate("--keep", "0.25") == 0
    turn, load = threading.Lock(), command.load_as_saved

    def load_in_turn(*args: Any) -> Any:
        """transformers unties weights globally while it loads: two threads at once leave it so."""
        with turn:
            return load(*args)

    monkeypatch.setattr(command, "load_as_saved", load_in_turn)
    fixed = ["--model", str(checkpoint), "--task", "records", "--data", str(data), *SMALL]
    args = parse(*fixed, "--keep", "0.25", "--output", str(tmp_path / "several" / "out"))
    barrier = threading.Barrier(size, timeout=120)
    teams = [Team(rank, size, lambda: (barrier.wait(), None)[1]) for rank in range(size)]
    evaluations = [command.make_evaluation(args, team) for team in teams]
    threads = [threading.Thread(target=one.run) for one in evaluations]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    shares = [len(list(evaluations[0].folder.glob(f"*.rank{rank}"))) for rank in range(size)]
    assert shares == [4] * size  # every process had a share of every case
    assert command.write(evaluations[0]) == 0
    for name in ("dense", "random-0.25-seed0", "downsample-0.25", "topk_cls-0.25"):
        assert read(case_file(tmp_path / "several", name)) == read(case_file(tmp_path, name))


def test_other_settings_have_a_run_of_their_own_in_the_same_folder(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    assert evaluate("--keep", "0.5", "--limit", "4") == 0
    assert evaluate("--keep", "0.5", "--limit", "4", "--option", "instruction=Be short.") == 0
    runs = json.loads((tmp_path / "out" / "eval.json").read_text())["runs"]
    assert len(runs) == len({run["run"] for run in runs}) == 2
    assert sorted(run["options"].get("instruction", "") for run in runs) == ["", "Be short."]
    assert (tmp_path / "out" / "eval.md").read_text().count("## records") == 2


# ---------------------------------------------------------------------------------- bad questions
@pytest.fixture
def damaged(data: Path, tmp_path: Path) -> Path:
    """The benchmark with one picture cut in half."""
    shutil.copytree(data.parent, tmp_path / "damaged")
    picture = tmp_path / "damaged" / "11.png"
    picture.write_bytes(picture.read_bytes()[:200])
    return tmp_path / "damaged" / "val.json"


def test_an_unreadable_picture_is_listed_and_left_out(
    evaluate: Evaluate, damaged: Path, tmp_path: Path
) -> None:
    options = ("--keep", "0.5", "--max-bad", "0.2", "--calibration", "0")
    assert evaluate(*options, data=damaged) == 0
    (run,) = json.loads((tmp_path / "out" / "eval.json").read_text())["runs"]
    assert [one["id"] for one in run["bad"]] == ["11-colour", "11-count"]
    assert all("unreadable image" in one["error"] for one in run["bad"])
    found = rows(tmp_path)
    assert {row["items"] for row in found.values()} == {22}
    assert found["dense", 1.0]["value"] == 1.0  # it is no wrong answer
    assert "2 question(s) could not be read" in (tmp_path / "out" / "eval.md").read_text()


def test_too_many_of_them_stop_the_run_until_they_are_repaired(
    evaluate: Evaluate, damaged: Path, data: Path, tmp_path: Path
) -> None:
    options = ("--keep", "0.5", "--calibration", "0")
    with pytest.raises(ValueError, match=r"of 24 questions cannot be read.*11-colour.*--retry"):
        evaluate(*options, data=damaged)
    shutil.copy(data.parent / "11.png", damaged.parent / "11.png")
    with pytest.raises(ValueError, match="--retry"):
        evaluate(*options, data=damaged)
    assert evaluate(*options, "--retry", data=damaged) == 0
    assert {row["items"] for row in rows(tmp_path).values()} == {24}


# ---------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--task", "recrods"), r"--task: unknown task 'recrods'; did you mean 'records'"),
        (("--methods", "fastvv"), "unknown method 'fastvv'"),
        (("--keep", "1.5"), "--keep"),
        (("--keep", "0"), "--keep"),
        (("--keep", "half"), "--keep: must be numbers joined by commas"),
        (("--batch-size", "0"), "--batch-size: must be at least 1, got 0"),
        (("--max-new-tokens", "0"), "--max-new-tokens: must be at least 1"),
        (("--limit", "0"), "--limit: must be at least 1"),
        (("--calibration", "-1"), "--calibration: must be at least 0"),
        (("--max-bad", "1"), r"--max-bad: must be in \[0, 1\)"),
        (("--option", "metric"), "--option: must be NAME=VALUE"),
        (("--option", "colour=red"), "unknown option 'colour'"),
        (("--model", "nowhere"), "nowhere: no such checkpoint folder"),
        (("--data", "nowhere.json"), "nowhere.json: no such file"),
        (("--image-root", "nowhere"), "--image-root nowhere: no such folder"),
        (("--calibration-data", "nowhere.json"), "nowhere.json: cannot be read"),
        (("--output", "/dev/null/out"), "cannot be written"),
    ],
)
def test_what_cannot_work_is_one_sentence_before_the_model_is_loaded(
    evaluate: Evaluate, options: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "load_as_saved", lambda args: pytest.fail("too late"))
    with pytest.raises(ValueError, match=reason) as told:
        evaluate("--keep", "0.5", *options)
    assert "\n" not in str(told.value)


def test_a_file_of_another_format_is_refused(evaluate: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('[{"prompt": "no answer"}]')
    with pytest.raises(ValueError, match=r"other\.json"):
        evaluate("--keep", "0.5", data=tmp_path / "other.json")


def test_foreign_files_among_the_answers_are_left_alone(evaluate: Evaluate, tmp_path: Path) -> None:
    assert evaluate("--keep", "0.5", "--limit", "2") == 0
    path = case_file(tmp_path, "topk_cls-0.5")
    path.write_text('{"mine": 1}\n')
    with pytest.raises(ValueError, match="line 1 is not an answer of `itprune eval`"):
        evaluate("--keep", "0.5", "--limit", "2")
    assert path.read_text() == '{"mine": 1}\n'


def test_a_data_set_that_is_all_set_aside_is_refused(
    evaluate: Evaluate, data: Path, tmp_path: Path
) -> None:
    record = json.loads(data.read_text())[0]
    shutil.copy(data.parent / record["image"], tmp_path)
    (tmp_path / "one.json").write_text(json.dumps([record]))
    assert evaluate("--keep", "0.5", data=tmp_path / "one.json") == 0  # a quarter of one is none
    assert rows(tmp_path)["dense", 1.0]["items"] == 1
