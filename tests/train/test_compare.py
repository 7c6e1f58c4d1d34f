"""The comparison study: means over seeds, reasons instead of figures, and one real small run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from itprune.comparing.data import read_parts
from train import compare
from train.compare import main, prune_overrides, trainable
from train.compare_table import merge, render
from train.scenes import write_dataset

SAMPLES = 12


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """What two seeds of a study leave, written by hand."""
    write_dataset(tmp_path / "data", 8, SAMPLES, seed=0, questions="quickstart")
    for seed in (0, 1):
        rows = [
            free("dense", 1.0, 0.9 + 0.1 * seed),
            free("random", 0.22, 0.5),
            free("topk_cls", 0.22, 0.8 + 0.1 * seed),
            free("fastv", 0.22, None),
            free("setok", 0.22, None),
        ]
        put(tmp_path / f"free-{seed}" / "compare.json", record(rows))
        tuned = tmp_path / "tuned"
        scored = len(read_parts(tmp_path / "data" / "val.json", None, 64).scored)
        for name, right in (("topk_cls", "1" * scored), ("setok", "01" * scored)):
            put(tuned / f"{name}-0.22-{seed}/score/rows.jsonl", score(name, right[:scored], seed))
        log = tuned / f"fastv-0.22-{seed}.log"
        log.write_text("starting\nerror: prune.keep: out of reach\n")
    return tmp_path


def free(name: str, keep: float, accuracy: float | None) -> dict[str, Any]:
    reason = "out of reach" if accuracy is None else None
    figures = {"visual_llm": 32.0, "layer_average": keep, "kv_entries": 99.0}
    speed = {"prefill_speedup": 2.0, "step_speedup": 3.0}
    gap = None if accuracy is None else accuracy - 0.9
    line = {"method": name, "keep": keep, "accuracy": accuracy, "difference": gap}
    return {**line, "reason": reason, **figures, **speed}


def record(rows: list[dict[str, Any]]) -> dict[str, Any]:
    timing = {"rounds": 5, "batch_size": 16, "clock": "CPU seconds of one thread"}
    return {"rows": rows, "machine": {"processor": "a cpu"}, "versions": {}, "timing": timing}


def score(name: str, right: str, seed: int) -> dict[str, Any]:
    answers = {"right": right, "visual_llm": 30.0, "layer_average": 0.2, "kv_entries": 90.0}
    dense = {"prefill_ms": 10.0, "step_ms": 30.0}
    time = {"prefill_ms": 5.0, "step_ms": 10.0, "dense": dense}
    return {"key": "k", "method": name, "answers": answers, **({} if seed else {"time": time})}


def put(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value) + "\n")


def test_the_table_has_means_spreads_and_reasons(study: Path) -> None:
    found = merge(study, [0, 1], [0.22], ["topk_cls", "fastv", "setok"])
    lines = {line["method"]: line for line in found["lines"]}
    assert list(lines) == ["dense", "random", "topk_cls", "setok", "fastv"]
    best = lines["topk_cls"]
    assert best["free"]["accuracy"] == pytest.approx(0.85)
    assert best["free"]["spread"] == pytest.approx(0.1 / 2**0.5)
    assert best["free"]["difference"] == pytest.approx(-0.05)
    assert best["tuned"]["accuracy"] == 1.0
    assert set(best["tuned"]["by_kind"].values()) == {1.0}
    assert best["layer_average"] == 0.22
    assert lines["random"]["tuned"] is None
    assert lines["fastv"]["tuned"] == {"reason": "prune.keep: out of reach"}
    assert lines["setok"]["free"] == {"reason": "out of reach"}
    assert lines["setok"]["prefill_speedup"] == 2.0
    assert lines["setok"]["layer_average"] == 0.2
    text = render(found)
    assert "| `topk_cls` | 0.22 | 85.0 ± 7.1 | -5.0 | 100.0 ± 0.0 | 32 | 0.220 | 99 |" in text
    assert "- No figure at 0.22: `fastv` (out of reach)." in text
    assert "| `fastv`" not in text
    assert "2 seed(s)" in text


def test_a_tuning_that_left_nothing_says_so(study: Path) -> None:
    def told() -> dict:
        found = merge(study, [0], [0.22], ["visionzip"])
        (line,) = (line for line in found["lines"] if line["method"] == "visionzip")
        assert line["free"] is None
        return line["tuned"]

    assert told() == {"reason": "not run"}
    log = study / "tuned" / "visionzip-0.22-0.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text("killed\n")
    assert told() == {"reason": "the tuning failed"}


def test_entries_become_overrides() -> None:
    assert prune_overrides("itprune:stage2=null:stage1.keep=0.3", 0.22) == [
        "prune=null",
        'prune.method="itprune"',
        "prune.keep=0.22",
        "prune.stage2=null",
        'prune.stage1={"keep": 0.3}',
    ]
    assert "prune.keep=null" in prune_overrides("dyvte", None)


def test_controls_are_tuned_beside_the_methods_that_train() -> None:
    names = trainable()
    assert {"random", "downsample", "itprune", "setok", "dyvte", "visionzip"} <= set(names)
    assert "gsearch" not in names


def test_it_says_where_to_run(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    assert "root folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_study_from_data_to_table(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    out = tmp_path / "study"
    command = ["--output", str(out), "--free", "topk_cls", "--tuned", "topk_cls", "fastv"]
    command += ["--keep", "0.22", "--seeds", "0", "--train", "24", "--val", "24", "--rounds", "1"]
    command += ["--set", "trainer.max_steps=2", "trainer.per_device_train_batch_size=4"]
    assert main(command) == 0
    told = capsys.readouterr().out
    lines = {line["method"]: line for line in json.loads((out / "table.json").read_text())["lines"]}
    assert list(lines) == ["dense", "random", "downsample", "topk_cls", "fastv"]
    assert lines["topk_cls"]["tuned"]["kept"] == pytest.approx(32 / 144)
    assert lines["topk_cls"]["free"]["spread"] == 0.0
    assert "0.25" in lines["fastv"]["tuned"]["reason"]
    assert told.strip() == (out / "table.md").read_text().strip()

    def no_run(command: list[str], log: Path) -> int:
        ran.append(log.name)
        return 2 if "fastv" in log.name else 0

    ran: list[str] = []
    monkeypatch.setattr(compare, "_run", no_run)
    assert main(command) == 0
    assert ran == ["free-0.log", "fastv-0.22-0.log"]  # the first knows itself what is left
