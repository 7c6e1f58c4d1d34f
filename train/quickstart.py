"""`make quickstart`: the main job from data to answers, in one go on a laptop CPU.

    python -m train.quickstart                   # all of it
    python -m train.quickstart --output build/q --train 600

Each step is an ordinary command of the project, printed before it runs: write a data set of
questions the bundled model has not been asked, tune it dense and pruned through the DeepSpeed
launcher, ask both about held-out scenes with `itprune infer`, the dense one also on random tokens
and on smaller pictures of the same budget, then print a table and draw pictures.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itprune.checkpoint import PrunerRecord
from train.scenes import answers, majority_accuracy, write_dataset

RECIPE = "configs/quickstart.yaml"
BASE = "assets/tiny-llava"
DENSE, PRUNED = "tuned dense", "tuned pruned"
CONTROLS = {"random": "dense, random tokens", "downsample": "dense, small pictures"}
"""Method -> row: what the pruned run has to beat."""
SHOWN = 6
"""Pictures drawn of kept patches."""


@dataclass(frozen=True)
class Run:
    """One row of the table."""

    name: str
    model: str
    log: Path | None
    """The trainer's log; None: not tuned."""
    answers: Path
    how: tuple[str, ...] = ()
    """Options of `itprune infer`."""


def main(argv: list[str] | None = None) -> int:
    """Runs every step; a step that fails ends with its own message and status."""
    parser = argparse.ArgumentParser(prog="python -m train.quickstart", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/quickstart"))
    parser.add_argument("--train", type=int, default=4800, help="training scenes")
    parser.add_argument("--val", type=int, default=240, help="held-out scenes")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the recipe")
    given = parser.parse_args(argv)
    if not Path(RECIPE).is_file():
        parser.error("run it from the project's root folder")
    started = time.monotonic()
    try:
        report(quickstart(given.output, given.train, given.val, given.overrides), given.output)
    except subprocess.CalledProcessError as error:
        print(f"error: `{shlex.join(error.cmd)}` failed ({error.returncode})", file=sys.stderr)
        return 1
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes.")
    return 0


def quickstart(out: Path, train: int, val: int, overrides: Sequence[str]) -> list[Run]:
    """Data, two tunings, five sets of answers."""
    data = out / "data"
    say(f"writing {train} + {val} scenes with new question types to {data}")
    split = write_dataset(data, train, val, seed=0, questions="quickstart")
    questions = data / "questions.jsonl"
    questions.write_text("".join(json.dumps(sample) + "\n" for sample in split["val"]))
    paths = [f"data.train={data}/train.json", f"data.val={data}/val.json"]
    runs = [Run("not tuned, dense", BASE, None, out / "base.jsonl")]
    for name, extra in (("dense", ["prune=null"]), ("pruned", [])):
        model = out / name
        place = [f"trainer.output_dir={model}"]
        run_command("deepspeed", "launch/train.py", RECIPE, *paths, *place, *extra, *overrides)
        log = model / "trainer_state.json"
        runs.append(Run(f"tuned {name}", str(model), log, out / f"{name}.jsonl"))
    keep = str(PrunerRecord.read(out / "pruned").config.final_keep or 0.22)
    for method, name in CONTROLS.items():
        how = ("--method", method, "--keep", keep)
        runs.append(Run(name, str(out / "dense"), None, out / f"{method}.jsonl", how))
    for run in runs:
        ask(run, questions)
    return runs


def ask(run: Run, questions: Path) -> None:
    """Answers the held-out questions with the real command."""
    place = ["--jsonl", str(questions), "--output", str(run.answers), "--quiet"]
    size = ["--batch-size", "16", "--max-new-tokens", "4"]
    run.answers.unlink(missing_ok=True)
    run_command(
        sys.executable, "-m", "itprune.cli", "infer", "--model", run.model, *run.how, *place, *size
    )


def report(runs: Sequence[Run], out: Path) -> None:
    """The table, the pictures and where everything lies."""
    from train.pictures import draw_curves, draw_kept

    data = out / "data"
    train, val = (json.loads((data / f"{s}.json").read_text()) for s in ("train", "val"))
    rows = [row(run, val) for run in runs]
    majority = majority_accuracy(train, val)
    mean = statistics.fmean(majority[sample["kind"]] for sample in val)
    print("\n" + table(rows, mean))
    pictures = out / "pictures"
    with_image = [data / sample["image"] for sample in val if "image" in sample][:SHOWN]
    asked = [sample["conversations"][0]["value"] for sample in val if "image" in sample][:SHOWN]
    model = next(run.model for run in runs if run.name == PRUNED)
    draw_kept(model, with_image, asked, pictures / "kept.png")
    logs = {run.name: history(run.log) for run in runs if run.log is not None}
    draw_curves(logs, pictures / "training.png")
    (out / "table.json").write_text(json.dumps({"rows": rows, "majority": mean}, indent=1) + "\n")
    print(f"\ncheckpoint   {model}\nTensorBoard  tensorboard --logdir {model}")
    print(f"pictures     {pictures}/kept.png, {pictures}/training.png")
    example = f'--image {with_image[0]} --prompt "{asked[0].split(chr(10))[-1]}"'
    print(f"ask it       itprune infer --model {model} {example}")


def row(run: Run, val: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy, kept tokens and step time of one run."""
    said = {r["id"]: r for r in map(json.loads, run.answers.read_text().splitlines())}
    right = [said[s["id"]]["answer"].strip() == answers(s)[-1] for s in val]
    kept = [r["visual_layer_average"] for r in said.values() if r.get("visual_layer_average")]
    steps = [h["step_time"] for h in history(run.log) if "step_time" in h] if run.log else []
    kinds = sorted({s["kind"] for s in val})
    by_kind = {
        kind: statistics.fmean(r for r, s in zip(right, val, strict=True) if s["kind"] == kind)
        for kind in kinds
    }
    return {
        "run": run.name,
        "accuracy": statistics.fmean(right),
        "by_kind": by_kind,
        "kept": statistics.fmean(kept) if kept else 1.0,
        "step_s": statistics.median(steps) if steps else None,
    }


def table(rows: Sequence[dict[str, Any]], majority: float) -> str:
    """The rows as aligned text, one column for each question type."""
    kinds = list(rows[0]["by_kind"])
    head = ["", "exact match", *kinds, "visual tokens", "step time"]
    lines = [head]
    for r in rows:
        step = "" if r["step_s"] is None else f"{r['step_s'] * 1000:.0f} ms"
        shares = [f"{r['by_kind'][kind]:.0%}" for kind in kinds]
        lines.append([r["run"], f"{r['accuracy']:.1%}", *shares, f"{r['kept']:.1%}", step])
    lines.append(["most frequent answer", f"{majority:.1%}"] + [""] * (len(kinds) + 2))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    steps = {r["run"]: r["step_s"] for r in rows}
    ratio = steps[DENSE] / steps[PRUNED]
    speed = f"\nA pruned training step is {ratio:.2f} times as fast as a dense one."
    text = "\n".join("  ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)) for x in lines)
    return text + speed


def history(log: Path) -> list[dict[str, Any]]:
    """The trainer's logged numbers."""
    entries: list[dict[str, Any]] = json.loads(log.read_text())["log_history"]
    return entries


def run_command(*command: str) -> None:
    """Prints and runs a command; raises CalledProcessError when it fails."""
    say("$ " + shlex.join(command).replace(sys.executable, "python"))
    subprocess.run(command, check=True)


def say(text: str) -> None:
    """A line on what happens next."""
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
