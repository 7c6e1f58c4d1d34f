"""Accuracy after tuning, method against method at one average budget, over several seeds.

    python -m train.compare --output build/compare            # 3 seeds, dense and four methods
    python -m train.compare --methods itprune random --seeds 0

Every run tunes the quickstart's recipe with the same data, steps and seed and answers the same
held-out scenes, all through the project's own commands. Finished runs are not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from train.quickstart import RECIPE, Run, row
from train.scenes import write_dataset

METHODS = ("dense", "itprune", "topk_cls", "random")


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing, prints the table, writes OUTPUT/compare.json."""
    parser = argparse.ArgumentParser(
        prog="python -m train.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("build/compare"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--keep", type=float, default=0.22)
    parser.add_argument("--train", type=int, default=4800, help="training scenes")
    parser.add_argument("--val", type=int, default=600, help="held-out scenes")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value")
    given = parser.parse_args(argv)
    data = given.output / "data"
    if not (data / "val.json").exists():
        split = write_dataset(data, given.train, given.val, seed=0, questions="quickstart")
        lines = "".join(json.dumps(sample) + "\n" for sample in split["val"])
        (data / "questions.jsonl").write_text(lines)
    jobs = [(method, seed) for seed in given.seeds for method in given.methods]
    try:
        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(lambda job: tune(given.output, job, given.keep, given.set), jobs))
    except subprocess.CalledProcessError as error:
        print(f"error: a run failed ({error.returncode}); its log lies in {given.output}")
        return 1
    rows = [summary(given.output, method, given.seeds) for method in given.methods]
    print(table(rows))
    (given.output / "compare.json").write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def tune(out: Path, job: tuple[str, int], keep: float, overrides: Sequence[str]) -> None:
    """One tuning (method, seed) and its answers, unless they are there."""
    method, seed = job
    folder = out / f"{method}-{seed}"
    answers = out / f"{method}-{seed}.jsonl"
    if answers.exists():
        return
    prune = [f"prune.keep={keep}"]
    if method != "itprune":
        prune = ["prune=null", f"prune.method={method}", *prune]
    if method == "dense":
        prune = ["prune=null"]
    data = [f"data.train={out}/data/train.json", f"data.val={out}/data/val.json"]
    run = [f"trainer.seed={seed}", f"trainer.output_dir={folder}", "trainer.save_strategy=no"]
    quiet = ["trainer.disable_tqdm=true", "trainer.report_to=none"]
    command = [sys.executable, "launch/train.py", RECIPE, *data, *run, *quiet, *prune, *overrides]
    partial = answers.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    ask = ["infer", "--model", str(folder), "--jsonl", f"{out}/data/questions.jsonl"]
    place = ["--output", str(partial), "--batch-size", "16", "--max-new-tokens", "4", "--quiet"]
    with (out / f"{method}-{seed}.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
        infer = [sys.executable, "-m", "itprune.cli", *ask, *place]
        subprocess.run(infer, check=True, stdout=log, stderr=log)
    partial.rename(answers)


def summary(out: Path, method: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Mean and spread over the seeds of one method."""
    val = json.loads((out / "data" / "val.json").read_text())
    found = []
    for seed in seeds:
        name = f"{method}-{seed}"
        run = Run(name, name, out / name / "trainer_state.json", out / f"{name}.jsonl")
        found.append(row(run, val))
    accuracies = [r["accuracy"] for r in found]
    return {
        "method": method,
        "accuracy": statistics.fmean(accuracies),
        "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "accuracies": accuracies,
        "kept": statistics.fmean(r["kept"] for r in found),
        "step_s": statistics.median(r["step_s"] for r in found),
        "by_kind": {
            kind: statistics.fmean(r["by_kind"][kind] for r in found)
            for kind in found[0]["by_kind"]
        },
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, one row a method."""
    kinds = list(rows[0]["by_kind"])
    lines = [
        f"| method | exact match | spread | {' | '.join(kinds)} | visual tokens |",
        "|---" * (len(kinds) + 4) + "|",
    ]
    for r in rows:
        shares = " | ".join(f"{100 * r['by_kind'][kind]:.1f}" for kind in kinds)
        accuracy = f"{100 * r['accuracy']:.1f} | {100 * r['spread']:.1f}"
        lines.append(f"| {r['method']} | {accuracy} | {shares} | {100 * r['kept']:.1f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
