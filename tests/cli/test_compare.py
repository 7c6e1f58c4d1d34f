"""`itprune compare`: cases scored as `itprune infer` answers them, timed in turns, resumed."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from itprune import load_pretrained
from itprune.answer import Answerer
from itprune.cli import compare as command
from itprune.cli import main
from itprune.comparing import run as comparing_run
from itprune.comparing.data import read_parts, references
from itprune.comparing.entries import Entry, make_cases, parse_entries
from itprune.comparing.plot import draw_pareto
from itprune.comparing.scoring import interval, is_right, normalise
from itprune.comparing.subject import Subject
from itprune.decoding import Decoding
from itprune.question import Question, open_image

PROMPTS = ("What colour is it?", "Which shape is on the left?", "red or blue?", "0 1 2 3")


@pytest.fixture(scope="module")
def data(base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 samples, four of each picture, whose answers are the dense model's own."""
    folder = tmp_path_factory.mktemp("data")
    answerer = Answerer(load_pretrained(base, device="cpu"), Decoding(max_new_tokens=4))
    records = []
    for picture in sorted(pictures.iterdir()):
        (folder / picture.name).symlink_to(picture)
        for prompt in PROMPTS:
            said = answerer([Question.from_prompt(prompt, [open_image(picture)])])[0].answer
            turns = [{"from": "human", "value": f"<image>\n{prompt}"}]
            records.append({"image": picture.name, "conversations": turns, "answer": said})
    path = folder / "val.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def compare(base: Path, data: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs the command on the tiny model into tmp_path/out."""

    def call(*options: str, **changed: Any) -> int:
        model, source = changed.get("model", base), changed.get("data", data)
        fixed = ["--model", str(model), "--data", str(source), "--output", str(tmp_path / "out")]
        small = ["--max-new-tokens", "4", "--batch-size", "4", "--rounds", "1", "--seeds", "0,1"]
        return main(["compare", *fixed, *small, "--device", "cpu", "--quiet", *options])

    return call


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "rows.jsonl").read_text().splitlines()]


def table(folder: Path) -> dict[tuple[str, float], dict[str, Any]]:
    record = json.loads((folder / "out" / "compare.json").read_text())
    return {(line["method"], line["keep"]): line for line in record["rows"]}


# ------------------------------------------------------------------------------------ the whole
def test_everything_is_measured_and_controls_are_always_there(
    compare: Callable[..., int], base: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    methods = "topk_cls,itprune,fastv,quecc,topk_cls+fastv"
    assert compare("--methods", methods, "--keep", "0.5,0.2") == 0
    told = capsys.readouterr().out
    found = table(tmp_path)
    for name in ("random", "downsample", "topk_cls", "itprune", "fastv", "quecc"):
        assert {keep for method, keep in found if method == name} == {0.2, 0.5}
        assert f"`{name}`" in told
    dense = found["dense", 1.0]
    assert dense["accuracy"] == 1.0
    assert dense["difference"] == 0.0
    assert dense["layer_average"] == dense["kv_ratio"] == dense["prefill_speedup"] == 1.0

    half = found["topk_cls", 0.5]
    assert half["visual_llm"] == 8
    assert half["layer_average"] == 0.5
    assert half["low"] <= half["accuracy"] <= half["high"]
    assert half["difference_low"] <= half["accuracy"] - 1 <= half["difference_high"]
    assert half["prefill_ms"] > 0
    assert half["step_ms"] > 0
    assert found["random", 0.5]["seeds"] == 2
    assert found["topk_cls+fastv", 0.5]["visual_llm"] < 16
    assert found["quecc", 0.5]["reason"].startswith("needs training")
    reason = found["fastv", 0.2]["reason"]
    assert "lowest" in reason
    assert reason.removeprefix("prune.keep: ") in told
    assert found["fastv", 0.2]["accuracy"] is None

    written = rows(tmp_path)
    fitted = {row["method"]: row["answers"]["calibration"] for row in written if "answers" in row}
    assert fitted["itprune"]["samples"] == 4
    assert fitted["topk_cls"] is None
    assert len({row["key"] for row in written}) == len(written) == 1 + 2 * 8
    assert len({row["time"]["session"] for row in written if "time" in row}) == 1
    with (tmp_path / "out" / "compare.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(found)
    assert (tmp_path / "out" / "compare.md").read_text().strip() in told
    assert (tmp_path / "out" / "pareto.png").stat().st_size > 10_000


def test_a_case_is_scored_as_infer_would_answer_it(
    compare: Callable[..., int], base: Path, data: Path, tmp_path: Path
) -> None:
    assert compare("--methods", "uniform", "--keep", "0.2", "--rounds", "0") == 0
    row = next(row for row in rows(tmp_path) if row["method"] == "uniform")
    parts = read_parts(data, None, 64)
    loaded = load_pretrained(base, method="uniform", keep=0.2, device="cpu")
    answerer = Answerer(loaded, Decoding(max_new_tokens=4))
    images = [data.parent / sample.pictures[0] for sample in parts.scored]
    questions = [
        Question.from_record(sample.record, lambda name: open_image(data.parent / name))
        for sample in parts.scored
    ]
    assert len(images) == len(row["answers"]["right"]) == 20
    said = [answerer([question])[0] for question in questions]
    right = [is_right(a.answer, s.answers) for a, s in zip(said, parts.scored, strict=True)]
    assert row["answers"]["right"] == "".join(str(int(r)) for r in right)
    assert row["answers"]["kv_entries"] == sum(a.kv_entries for a in said) / len(said)
    assert "time" not in row
    assert table(tmp_path)["uniform", 0.2]["prefill_ms"] is None


# ---------------------------------------------------------------------------------- resuming
def test_a_second_call_does_only_what_is_missing(
    compare: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compare("--methods", "uniform", "--keep", "0.5") == 0
    before = (tmp_path / "out" / "rows.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(command, "load_as_saved", lambda args: pytest.fail("the model is not needed"))
        assert compare("--methods", "uniform", "--keep", "0.5") == 0
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == before

    asked: list[str] = []
    answer = comparing_run.answer_case

    def spy(subject: Any, case: Any, *rest: Any) -> Any:
        asked.append(case.name)
        return answer(subject, case, *rest)

    monkeypatch.setattr(comparing_run, "answer_case", spy)
    assert compare("--methods", "uniform,topk_cls", "--keep", "0.5") == 0
    assert asked == ["topk_cls at 0.5"]
    sessions = {row["method"]: row["time"]["session"] for row in rows(tmp_path) if "time" in row}
    assert sessions == {"dense": 2, "random": 1, "downsample": 1, "uniform": 1, "topk_cls": 2}
    own = {row["method"]: row for row in rows(tmp_path)}
    assert own["topk_cls"]["time"]["dense"]["step_ms"] == own["dense"]["time"]["step_ms"]

    assert compare("--methods", "uniform,topk_cls", "--keep", "0.5", "--retime") == 0
    assert {row["time"]["session"] for row in rows(tmp_path) if "time" in row} == {3}
    asked.clear()
    assert compare("--methods", "uniform", "--keep", "0.5", "--limit", "8") == 0  # other data
    assert len(asked) == 5


def test_an_interrupted_run_keeps_what_it_has(
    compare: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    answer = comparing_run.answer_case

    def stop_at_third(subject: Any, case: Any, *rest: Any) -> Any:
        asked.append(case.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return answer(subject, case, *rest)

    monkeypatch.setattr(comparing_run, "answer_case", stop_at_third)
    assert compare("--methods", "uniform", "--keep", "0.5") == 130
    assert len(rows(tmp_path)) == 2
    with (tmp_path / "out" / "rows.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    assert compare("--methods", "uniform", "--keep", "0.5") == 0
    assert asked[:2] == ["dense at 1", "random at 0.5, seed 0"]
    assert sorted(asked[2:]) == sorted(
        ["random at 0.5, seed 1"] * 2 + ["downsample at 0.5", "uniform at 0.5"]
    )


def test_what_was_left_out_is_tried_again_on_demand(
    compare: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    options = ("--methods", "fastv", "--keep", "0.2", "--rounds", "0")
    assert compare(*options) == 0
    answer = comparing_run.answer_case

    def spy(subject: Any, case: Any, *rest: Any) -> Any:
        asked.append(case.name)
        return answer(subject, case, *rest)

    monkeypatch.setattr(comparing_run, "answer_case", spy)
    assert compare(*options) == 0
    assert asked == []
    assert compare(*options, "--retry") == 0
    assert asked == ["fastv at 0.2"]


# ---------------------------------------------------------------------------- checkpoint's own
def test_a_checkpoints_own_method_comes_with_its_options(
    compare: Callable[..., int], checkpoint: Path, data: Path
) -> None:
    subject = Subject(load_pretrained(checkpoint, device="cpu"))
    own, other = parse_entries("itprune,uniform")[-2:]
    (case,) = make_cases([own], [0.5], [0])
    assert subject.config(case).options == subject.own.options  # type: ignore[union-attr]
    (case,) = make_cases([other], [0.5], [0])
    assert subject.config(case).options == {}
    assert subject.config(case).label_only_logits == "always"


def test_a_timed_step_trains_projector_and_method_only_and_leaves_no_trace(base: Path) -> None:
    subject = Subject(load_pretrained(base, device="cpu"))
    model = subject.model
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    (case,) = make_cases([Entry.parse("uniform")], [0.5], [0])
    with subject.wearing(case) as attached, subject.training(attached):
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all("multi_modal_projector" in name for name in trained)
        assert model.training
    left = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert left == {"lm_head"}
    assert not model.training


# ------------------------------------------------------------------------------------- parts
def test_calibration_and_scored_part_share_no_picture(data: Path) -> None:
    parts = read_parts(data, None, 3)
    scored = {p for s in parts.scored for p in s.pictures}
    fitted = {p for s in parts.calibration for p in s.pictures}
    assert fitted
    assert fitted.isdisjoint(scored)
    assert len(parts.calibration) == 3
    assert len(parts.scored) == 20
    assert len(read_parts(data, 7, 3).scored) == 7
    assert read_parts(data, 7, 3) == read_parts(data, 7, 3)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "a", "answer": "b"}, ("b",)),
        ({"prompt": "a", "answers": ["b", "c", 3]}, ("b", "c")),
        ({"conversations": [{"from": "human", "value": "a"}]}, ()),
        ({"conversations": [{"from": "gpt", "value": "x"}, {"from": "gpt", "value": "y"}]}, ("y",)),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "z"}]}]},
            ("z",),
        ),
        ({"messages": "none"}, ()),
        ({"prompt": "a"}, ()),
    ],
)
def test_answers_of_a_record(record: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert references(record) == expected


def test_exact_match_overlooks_case_space_and_ends() -> None:
    assert normalise(' "A  red\nSquare."') == "a red square"
    assert is_right("Seven.", ["7", "seven"])
    assert not is_right("seventeen", ["seven"])
    assert not is_right("3.5", ["35"])


def test_the_interval_covers_what_it_should() -> None:
    assert interval([1.0] * 50) == (1.0, 1.0)
    values = [1.0] * 120 + [0.0] * 280
    low, high = interval(values)
    half = 1.96 * (0.3 * 0.7 / 400) ** 0.5
    assert low == pytest.approx(0.3 - half, abs=0.008)
    assert high == pytest.approx(0.3 + half, abs=0.008)
    assert interval(values) == (low, high)
    draws, hits = torch.Generator().manual_seed(1), 0
    for _ in range(60):
        sample = (torch.rand(80, generator=draws) < 0.3).double().tolist()
        low, high = interval(sample)
        hits += low <= 0.3 <= high
    assert hits >= 50  # 57 expected


def test_entries_and_cases() -> None:
    entries = parse_entries("itprune:stage2.layers=[1,2]:stage1.keep=0.3,random,visionzip+fastv")
    assert [entry.label for entry in entries[:3]] == ["dense", "random", "downsample"]
    assert len(entries) == 5
    assert entries[3].options == {"stage2": {"layers": [1, 2]}, "stage1": {"keep": 0.3}}
    assert entries[4].method == "visionzip+fastv"
    cases = make_cases(entries, [0.22, 0.11, 0.22], [0, 1])
    assert len(cases) == 1 + 2 * (2 + 1 + 1 + 1)
    assert len({case.key("run") for case in cases}) == len(cases)
    assert cases[0].key("run") != cases[0].key("another")


# ------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--methods", "fastvv"], "did you mean 'fastv'?"),
        (["--methods", "fastv:layerz=2"], "unknown option 'layerz'"),
        (["--methods", "fastv:layers"], "options are written name:option=value"),
        (["--methods", "visionzip+topk_cls"], "both act at the place"),
        (["--keep", "0.5,2"], "--keep: must be a fraction"),
        (["--keep", "half"], "--keep: must be numbers joined by commas"),
        (["--seeds", "0.5"], "--seeds: must be numbers joined by commas"),
        (["--limit", "0"], "--limit: must be at least 1"),
        (["--rounds", "-1"], "--rounds: must be at least 0"),
        (["--image-root", "nowhere"], "--image-root nowhere: no such folder"),
        (["--model", "nowhere"], "nowhere: no such checkpoint folder"),
        (["--data", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--data", "unanswered.json"], "no record has an answer"),
        (["--data", "gone.json"], "sample 7: missing image"),
        (["--output", "full"], "line 1 is not a row of `itprune compare`"),
        (["--output", "full/rows.jsonl"], "cannot be written"),
    ],
)
def test_refusals(
    compare: Callable[..., int],
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unanswered.json").write_text('[{"prompt": "a"}]')
    (tmp_path / "gone.json").write_text('[{"id": 7, "prompt": "a", "answer": "b", "image": "c"}]')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "rows.jsonl").write_text('{"mine": 1}\n')
    assert compare("--methods", "uniform", "--keep", "0.5", *options) == 1
    told = capsys.readouterr().err
    assert reason in told
    assert told.count("\n") == 1
    assert (tmp_path / "full" / "rows.jsonl").read_text() == '{"mine": 1}\n'


# ---------------------------------------------------------------------------------- the picture
def test_without_matplotlib_there_is_one_sentence_and_all_else(
    compare: Callable[..., int], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert compare("--methods", "uniform", "--keep", "0.5", "--rounds", "0") == 0
    told = capsys.readouterr()
    assert told.err.count("pip install 'itprune[plots]'") == 1
    assert "pareto.png" not in told.out
    assert not (tmp_path / "out" / "pareto.png").exists()
    assert (tmp_path / "out" / "compare.md").exists()


def synthetic(methods: int) -> list[dict[str, Any]]:
    def line(name: str, keep: float, accuracy: float) -> dict[str, Any]:
        place = {"layer_average": keep, "prefill_ms": 10 + 90 * keep}
        spread = {"accuracy": accuracy, "low": accuracy - 0.03, "high": accuracy + 0.03}
        return {"method": name, "keep": keep, **place, **spread}

    names = ["random", "downsample", *(f"method_{i}" for i in range(methods))]
    shown = [line("dense", 1.0, 0.95)]
    for number, name in enumerate(names):
        budgets = (0.44,) if number % 5 == 4 else (0.11, 0.22, 0.44)
        shown += [line(name, keep, 0.9 - 0.02 * number * (1 - keep)) for keep in budgets]
    return [*shown, {"method": "left_out", "keep": 0.11, "accuracy": None, "reason": "why"}]


@pytest.mark.parametrize("methods", [0, 3, 22])
def test_names_in_the_picture_do_not_overlap(
    methods: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    drawn: list[Any] = []
    write = Axes.text

    def spy(self: Axes, *args: Any, **kwargs: Any) -> Any:
        drawn.append(write(self, *args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(Axes, "text", spy)
    draw_pareto(synthetic(methods), tmp_path / "p" / "pareto.png")  # type: ignore[arg-type]
    assert (tmp_path / "p" / "pareto.png").stat().st_size > 10_000
    assert {"dense", "random", "downsample"} <= {text.get_text() for text in drawn}
    boxes = [text.get_window_extent() for text in drawn]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
