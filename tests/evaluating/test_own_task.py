"""The task of docs/evaluate.md works as it stands there, brought by a package of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.evaluating.conftest import MODEL, SMALL

ROOT = Path(__file__).parents[2]


def test_the_documented_task_is_evaluated(data: Path, tmp_path: Path) -> None:
    document = (ROOT / "docs" / "evaluate.md").read_text()
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", document, re.S) if "Counting" in c)
    site = tmp_path / "site"
    info = site / "my_package-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "my_package").mkdir()
    (site / "my_package" / "counting.py").write_text(code)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[itprune.tasks]\ncounting = my_package.counting\n")
    rows = [f"{i}.png,How many digits are there?,{i % 3},digit" for i in range(6)]
    (tmp_path / "counts.csv").write_text("\n".join(["image,question,count,thing", *rows]) + "\n")
    command = ["eval", "--model", str(MODEL), "--task", "counting", "--data",
               str(tmp_path / "counts.csv"), "--image-root", str(data.parent), "--keep", "0.5",
               "--methods", "uniform", "--calibration", "0",
               "--output", str(tmp_path / "out"), *SMALL]  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "itprune.cli", *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])},
        check=True,
    )
    (run,) = json.loads((tmp_path / "out" / "eval.json").read_text())["runs"]
    assert (run["task"], run["metric"], run["share"], run["items"]) == (
        "counting",
        "closeness",
        True,
        6,
    )
    dense = run["rows"][0]
    assert dense["kinds"]["digit"]["items"] == 6
    said = [
        json.loads(line) for line in next((tmp_path / "out").glob("answers/*/dense.jsonl")).open()
    ]
    assert dense["value"] == sum(one["score"] for one in said) / 6


def test_the_documented_task_scores_as_it_says() -> None:
    document = (ROOT / "docs" / "evaluate.md").read_text()
    (body,) = re.findall(r"    def score\(.*?(?=```)", document, re.S)
    names: dict[str, type] = {}
    text = f"from __future__ import annotations\nclass Scorer:\n{body}"
    exec(compile(text, "evaluate.md", "exec"), names)
    item = type("Item", (), {"references": ("3",)})()
    scores = [names["Scorer"]().score(item, said) for said in ("3", " 3.", "4", "5", "three", "²")]
    assert [one["score"] for one in scores] == [1.0, 1.0, 0.5, 0.0, 0.0, 0.0]
