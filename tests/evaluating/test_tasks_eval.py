"""Benchmarks in their own formats, from file to table: pictures in the data, pairs, figures."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.evaluating.conftest import MODEL, SMALL, parse


def evaluated(task: str, file: Path, out: Path, *options: str) -> dict[str, Any]:
    """The run of a call."""
    args = parse("--model", str(MODEL), "--task", task, "--data", str(file), "--output", str(out),
                 "--methods", "uniform", "--keep", "0.5", *SMALL, *options)  # fmt: skip
    assert args.run(args) == 0
    (run,) = json.loads((out / "eval.json").read_text())["runs"]
    return dict(run)


def test_pope_has_all_its_figures(data: Path, tmp_path: Path) -> None:
    lines = [
        {"question_id": i, "image": f"{i % 12}.png", "text": "Is there a dog?", "label": "no"}
        if i % 2
        else {"question_id": i, "image": f"{i % 12}.png", "text": "Is there a 1?", "label": "yes"}
        for i in range(24)
    ]
    file = tmp_path / "coco_pope_random.json"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = evaluated("pope", file, tmp_path / "out", "--image-root", str(data.parent))
    assert run["metric"] == "f1"
    assert run["draws"] == 500
    dense = run["rows"][0]
    assert {"f1", "precision", "recall", "accuracy"} <= dense["figures"].keys()
    assert dense["figures"]["f1"] == dense["value"]
    assert dense["low"] <= dense["value"] <= dense["high"]


def test_mmbench_asks_pictures_inside_its_table(data: Path, tmp_path: Path) -> None:
    rows = ["index\tquestion\tA\tB\tanswer\tcategory\timage"]
    for index in range(8):
        picture = base64.b64encode((data.parent / f"{index}.png").read_bytes()).decode()
        rows.append(f"{index}\tWhich digit?\tone\ttwo\tA\tdigits\t{picture}")
        rows.append(f"{1_000_000 + index}\tWhich digit?\ttwo\tone\tB\tdigits\t{index}")
    file = tmp_path / "mmbench.tsv"
    file.write_text("\n".join(rows) + "\n")
    run = evaluated("mmbench", file, tmp_path / "out", "--limit", "6")
    assert run["items"] == 6
    assert {row["method"] for row in run["rows"]} == {"dense", "random", "downsample", "uniform"}
    (said,) = (tmp_path / "out" / "answers").glob("*/dense.jsonl")
    ids = [json.loads(line)["id"] for line in said.read_text().splitlines()]
    assert len(ids) == 6
    assert run["rows"][0]["kinds"]["digits"]["items"] == 6


@pytest.mark.parametrize("right", ["Yes", "No"])
def test_mme_is_told_in_points(data: Path, tmp_path: Path, right: str) -> None:
    folder = tmp_path / "mme" / "count"
    folder.mkdir(parents=True)
    for index in range(8):
        (folder / f"{index}.png").write_bytes((data.parent / f"{index}.png").read_bytes())
        (folder / f"{index}.txt").write_text(f"Is there a 1?\t{right}\nIs there a 2?\tNo\n")
    run = evaluated("mme", tmp_path / "mme", tmp_path / "out", "--calibration", "0")
    assert run["metric"] == "mme_score"
    assert run["items"] == 16
    assert 0 <= run["rows"][0]["value"] <= 200
    assert run["rows"][0]["figures"]["perception"] == run["rows"][0]["value"]


def test_a_group_with_a_picture_nobody_can_read_is_left_out_whole(
    data: Path, tmp_path: Path
) -> None:
    rows = ["index\tquestion\tA\tB\tanswer\timage"]
    for index in range(4):
        raw = (data.parent / f"{index}.png").read_bytes()
        for turn, answer in enumerate("AB"):
            cut = raw[:200] if (index, turn) == (2, 1) else raw
            picture = base64.b64encode(cut).decode()
            rows.append(f"{turn * 1_000_000 + index}\tWhich?\tone\ttwo\t{answer}\t{picture}")
    file = tmp_path / "mmbench.tsv"
    file.write_text("\n".join(rows) + "\n")
    options = ("--calibration", "0", "--max-bad", "0.2")
    run = evaluated("mmbench", file, tmp_path / "out", *options)
    assert [one["id"] for one in run["bad"]] == ["1000002"]
    assert run["items"] == 6
    (said,) = (tmp_path / "out" / "answers").glob("*/dense.jsonl")
    records = [json.loads(line) for line in said.read_text().splitlines()]
    assert sorted(r["id"] for r in records if "score" not in r) == ["1000002", "2"]
