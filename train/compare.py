"""All methods on one model: training-free on dense-tuned checkpoints, and after the same tuning.

    python -m train.compare --jobs 2                              # every method, three seeds
    python -m train.compare --free itprune topk_cls --tuned itprune --keep 0.22 --seeds 0

For each seed the quickstart's recipe tunes the bundled model dense. `itprune compare` then runs
every method on that checkpoint, training-free. Methods that train are tuned as well, each at each
budget: the same recipe, data, steps and seed, their own parts included; exit routers are trained on
the dense-tuned model, as published. Finished work is not done again.

    OUTPUT/data                     scenes; a part of the held-out ones is there to calibrate on
    OUTPUT/dense-SEED               the dense-tuned checkpoint
    OUTPUT/free-SEED                what `itprune compare` wrote about it
    OUTPUT/tuned/METHOD-KEEP-SEED   checkpoint, its log and its scores
    OUTPUT/table.md, table.json     both together, means and spread over the seeds
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from itprune.comparing.entries import CONTROLS, DENSE, Entry
from itprune.methods import methods
from train.compare_score import BATCH, NEW_TOKENS
from train.compare_table import merge, render
from train.quickstart import RECIPE
from train.scenes import write_dataset

TRAINS = ("optional", "required")
ROUTED = ("dyvte",)
"""Methods whose trained parts are exit routers, with everything else frozen."""
REFUSED = 2
"""Status of a training whose recipe cannot be, such as a budget out of reach."""
BASELINES = ("itprune", "topk_cls", *CONTROLS)
"""Tuned beside the methods that train: a tuning shows nothing without them."""


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing, writes and prints the table."""
    given = _parser().parse_args(argv)
    out = given.output
    if not Path(RECIPE).is_file():
        print("error: run it from the project's root folder", file=sys.stderr)
        return 2
    _write_data(out / "data", given.train, given.val)
    study = Study(out, given.keep, given.seeds, given.rounds, given.set)
    try:
        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(study.tune_dense, given.seeds))
            study.compare_free(given.free, given.seeds[0])  # alone: here methods are timed
            list(pool.map(lambda seed: study.compare_free(given.free, seed), given.seeds[1:]))
            routed = [(e, s) for s in given.seeds for e in given.tuned if e in ROUTED]
            failed = list(pool.map(lambda job: attempt(study.train_router, job), routed))
            jobs = [(e, k, s) for s in given.seeds for e in given.tuned for k in given.keep]
            failed += pool.map(lambda job: attempt(study.tune, job), jobs)
    except subprocess.CalledProcessError as error:
        print(f"error: a run failed ({error.returncode}); its log lies in {out}", file=sys.stderr)
        return 1
    record = merge(out, given.seeds, given.keep, given.tuned)
    (out / "table.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = render(record)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    told = [line for line in failed if line]
    print("".join(f"failed: {line}\n" for line in told), end="", file=sys.stderr)
    return 1 if told else 0


def attempt(step: Callable[..., None], job: tuple[Any, ...]) -> str:
    """Runs one of many tunings, which costs the others nothing when it fails; "" or what failed."""
    try:
        step(*job)
    except subprocess.CalledProcessError as error:
        return f"{' '.join(map(str, job))} ({error.returncode})"
    return ""


class Study:
    """What is tuned and scored, and where it lies.

    Args:
        out: the folder of everything.
        keeps: budgets.
        seeds: of tuning.
        rounds: timed rounds of the training-free comparison.
        overrides: of the recipe.
    """

    def __init__(
        self,
        out: Path,
        keeps: Sequence[float],
        seeds: Sequence[int],
        rounds: int,
        overrides: Sequence[str],
    ) -> None:
        self.out, self.keeps, self.overrides = out, keeps, list(overrides)
        self.rounds, self.timed = rounds, seeds[0]

    # ------------------------------------------------------------------------ dense, free
    def tune_dense(self, seed: int) -> None:
        """The checkpoint everything training-free runs on."""
        self._train(self.out / f"dense-{seed}", seed, ["prune=null"])

    def compare_free(self, entries: Sequence[str], seed: int) -> None:
        """`itprune compare` on the dense-tuned checkpoint."""
        model, folder = self.out / f"dense-{seed}", self.out / f"free-{seed}"
        rounds = self.rounds if seed == self.timed else 0
        options = {
            "--model": model,
            "--data": self.out / "data" / "val.json",
            "--methods": ",".join(entries),
            "--keep": ",".join(f"{keep:g}" for keep in self.keeps),
            "--output": folder,
            "--rounds": rounds,
            "--batch-size": BATCH,
            "--max-new-tokens": NEW_TOKENS,
            "--device": "cpu",
        }
        pairs = (str(piece) for pair in options.items() for piece in pair)
        _must_run(_itprune("compare", *pairs), folder.with_name(f"{folder.name}.log"))

    # ------------------------------------------------------------------------ tuned
    def tune(self, label: str, keep: float, seed: int) -> None:
        """One method tuned at one budget, and its score; where that is out of reach, the reason."""
        if label == DENSE:
            return
        folder = self.out / "tuned" / f"{label}-{keep:g}-{seed}"
        model = folder
        if label in ROUTED:
            model = self.out / "tuned" / f"{label}-{seed}"
        elif not self._train(folder, seed, prune_overrides(label, keep)):
            return
        done = folder / "score" / "done"
        if done.exists():
            return
        rounds = self.rounds if seed == self.timed and _required(label) else 0
        score = [str(model), f"{self.out}/data/val.json", label, f"{keep:g}", str(done.parent)]
        command = [sys.executable, "-m", "train.compare_score", *score, "--rounds", str(rounds)]
        _must_run(command, folder / "score.log")
        done.touch()

    def train_router(self, label: str, seed: int) -> None:
        """Routers on the merged dense-tuned model; they serve every budget."""
        merged = self.out / f"dense-{seed}-merged"
        log = self.out / f"dense-{seed}-merged.log"
        if not merged.exists():
            merge_model = ["merge", "--model", str(self.out / f"dense-{seed}")]
            _must_run(_itprune(*merge_model, "--output", str(merged)), log)
        # A null target: the routers alone decide in training, a calibration meets it later.
        routers = [f"model.path={merged}", "model.mode=router", "lora=null"]
        folder = self.out / "tuned" / f"{label}-{seed}"
        self._train(folder, seed, [*prune_overrides(label, None), *routers])

    # ------------------------------------------------------------------------ commands
    def _train(self, folder: Path, seed: int, overrides: Sequence[str]) -> bool:
        """Tunes into a folder; False: the recipe was refused, which the log tells."""
        log = folder.with_name(f"{folder.name}.log")
        if (folder / "trainer_state.json").exists():
            return True
        data = [f"data.{part}={self.out}/data/{part}.json" for part in ("train", "val")]
        place = [f"trainer.output_dir={folder}", f"trainer.seed={seed}"]
        quiet = ["save_strategy=no", "disable_tqdm=true", "report_to=none"]
        common = [*data, *place, *(f"trainer.{option}" for option in quiet)]
        command = [sys.executable, "launch/train.py", RECIPE, *common, *overrides, *self.overrides]
        done = _run(command, log)
        if done not in (0, REFUSED):
            raise subprocess.CalledProcessError(done, command)
        return done == 0


def _run(command: Sequence[str], log: Path) -> int:
    """Runs a command of the project into a log; its status."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        return subprocess.run(command, check=False, stdout=file, stderr=file).returncode


def _must_run(command: Sequence[str], log: Path) -> None:
    done = _run(command, log)
    if done:
        raise subprocess.CalledProcessError(done, command)


def prune_overrides(label: str, keep: float | None) -> list[str]:
    """The recipe's `prune` section for an entry, as overrides."""
    entry = Entry.parse(label)
    values: dict[str, Any] = {"method": entry.method, "keep": keep, **entry.options}
    return ["prune=null", *(f"prune.{name}={json.dumps(value)}" for name, value in values.items())]


def trainable() -> list[str]:
    """The methods that train, and the baselines beside them."""
    known = [name for name in methods() if Entry.parse(name).probe().card.training in TRAINS]
    return list(dict.fromkeys([*BASELINES, *known]))


def _required(label: str) -> bool:
    return Entry.parse(label).probe().card.training == "required"


def _itprune(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "itprune.cli", *arguments]


def _write_data(folder: Path, train: int, val: int) -> None:
    if not (folder / "val.json").exists():
        write_dataset(folder, train, val, seed=0, questions="quickstart")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("build/compare"))
    parser.add_argument(
        "--free", nargs="+", default=list(methods()), metavar="ENTRY", help="run training-free"
    )
    parser.add_argument(
        "--tuned", nargs="*", default=trainable(), metavar="ENTRY", help="tuned at each budget"
    )
    parser.add_argument("--keep", nargs="+", type=float, default=[0.11, 0.22, 0.44])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=4800, help="training scenes")
    parser.add_argument(
        "--val", type=int, default=664, help="held-out scenes; 64 of them to calibrate on"
    )
    parser.add_argument("--jobs", type=int, default=1, help="tunings at a time")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value")
    return parser


if __name__ == "__main__":
    sys.exit(main())
