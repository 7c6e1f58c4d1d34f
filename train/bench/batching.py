"""What batching by kept tokens is worth: whole runs with it and with a fixed number of samples.

    python -m train.bench.batching                        # two processes, pruned and packed
    python -m train.bench.batching --processes 1 --dense  # where padding is what is saved

The data is skewed as instruction data is: many short samples, few long ones, few with several
images. Both kinds of run see about one epoch, as many kept tokens a step on average, through the
real entry point, in turns, and are evaluated on the same other samples. With several processes a
step lasts as long as its longest batch, and that is what equal batches save; in one process rows
that are padded save their padding, and packed rows have nothing to save but the cost of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import yaml
from PIL import Image

from itprune.bench.record import versions
from itprune.bench.shapes import find_shape
from train.data.batches import Budget, Ranks, TokenBatches
from train.data.collate import Collator
from train.data.dataset import build_dataset
from train.data.encode import Encoder
from train.model import load_processor
from train.recipe.arguments import ROOT
from train.recipe.sections import DataSection

TOKENIZER = ROOT / "assets/tiny-llava"
WORDS = ("red", "green", "blue", "seven", "three", "circle", "square", "left", "right", "above")
WARM_UP = 2
"""Steps at the start of a run that are not counted."""
OTHERS = 32
"""Samples of the evaluation."""
EVALUATIONS = 3
"""In a run."""
PASSES = 100
"""Epochs of a forecast, so that rounding to whole steps does not matter."""
Say = Callable[[str], None]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.bench.batching",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", default="cpu", help="a LLaVA shape of `itprune bench`")
    parser.add_argument("--processes", type=int, default=2, help="default 2")
    parser.add_argument("--batch", type=int, default=5, help="samples of a fixed batch; default 5")
    parser.add_argument("--steps", type=int, default=12, help="of a run; default 12")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind; default 3")
    parser.add_argument("--keep", type=float, default=0.22, help="visual tokens kept; default 0.22")
    parser.add_argument("--layout", default="packed", help="packed (default) or padded")
    parser.add_argument("--dense", action="store_true", help="without pruning")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the record there, too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the bench and prints; 2 for numbers that cannot be."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in ("processes", "batch", "rounds"):
        if vars(args)[name] < 1:
            parser.error(f"--{name}: must be at least 1")
    if args.steps <= WARM_UP:
        parser.error(f"--steps: must be more than {WARM_UP}, which warm up")
    with tempfile.TemporaryDirectory(prefix="itprune-batching-") as folder:
        try:
            record = measure(Path(folder), args, lambda line: print(line, flush=True))
        except ValueError as error:
            parser.error(str(error))
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(folder: Path, args: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Runs both kinds in turns.

    Returns:
        A JSON-able record: every run, and the ratios of the rounds.
    """
    write_model(folder / "model", args.shape)
    data = write_data(folder / "data", args.steps * args.batch * args.processes)
    write_data(folder / "other", OTHERS, seed=1)
    limit, costs = compare_plans(folder / "model", data, args)
    bound = bound_of(costs, args)
    say(f"a step of fixed batches lasts {bound:.2f} times as long as its samples on average need")
    runs: list[dict[str, Any]] = []
    for turn in range(args.rounds):
        for kind in ("fixed", "tokens"):
            found = one_run(folder, data, args, kind, limit, turn)
            runs.append(found)
            say(
                f"round {turn + 1}, {kind:6}: {found['tokens_per_s']:7.0f} tokens/s, "
                f"{found['kept_per_s']:7.0f} kept; {found['kept_per_step']:6.0f} kept tokens and "
                f"{found['samples_per_step']:5.1f} samples a step of "
                f"{found['step_s']:.2f} s; loss on other samples {_curve(found['losses'])}"
            )
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    ratios, kept_ratios = (
        [tokens[rate] / fixed[rate] for fixed, tokens in pairs]
        for rate in ("tokens_per_s", "kept_per_s")
    )
    say(
        f"batches of kept tokens over fixed ones: {median(ratios):.2f} times the tokens/s, "
        f"{median(kept_ratios):.2f} times the kept tokens/s (medians of {len(pairs)})"
    )
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    return {
        "bench": "batching",
        **settings,
        "limit": limit,
        "bound": bound,
        "ratio": median(ratios),
        "ratios": ratios,
        "kept_ratio": median(kept_ratios),
        "kept_ratios": kept_ratios,
        "runs": runs,
        "versions": versions(),
    }


def _curve(losses: list[float]) -> str:
    return ", ".join(f"{loss:.3f}" for loss in losses)


def write_model(folder: Path, shape: str) -> None:
    """A model of a shape with random weights, and a processor that fits it."""
    import torch
    from transformers import AutoModelForImageTextToText, LlavaConfig

    size = find_shape(shape)
    config = size.config()
    if not isinstance(config, LlavaConfig):
        raise ValueError(f"--shape: {shape} is not a LLaVA shape")
    processor = load_processor(str(TOKENIZER))
    side = config.vision_config.image_size
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    processor.patch_size = config.vision_config.patch_size
    config.image_token_id = processor.image_token_id
    text = config.text_config
    text.vocab_size = max(text.vocab_size, len(processor.tokenizer))
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def write_data(folder: Path, samples: int, seed: int = 0) -> Path:
    """LLaVA JSON: mostly short answers about one image or none; one in twenty is long, one in ten
    is about 4 to 6 images."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(16):
        noise = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((320, 240)).save(folder / f"images/{i}.jpg")
    choose = random.Random(seed)
    records = []
    for _ in range(samples):
        kind = choose.random()
        images = choose.randint(4, 6) if kind < 0.1 else int(kind < 0.3)
        words = choose.randint(150, 300) if kind > 0.95 else choose.randint(4, 30)
        named = [f"images/{choose.randrange(16)}.jpg" for _ in range(images)] or None
        answer = " ".join(choose.choice(WORDS) for _ in range(words))
        turns = [
            {"from": "human", "value": "<image>\n" * images + "What is there?"},
            {"from": "gpt", "value": answer},
        ]
        records.append({"image": named, "conversations": turns})
    path = folder / "train.json"
    path.write_text(json.dumps(records))
    return path


def compare_plans(model: Path, data: Path, args: argparse.Namespace) -> tuple[int, list[float]]:
    """The limit at which a step has as many samples as with fixed batches, hence as many kept
    tokens, averaged over an epoch; and the kept tokens of every sample, as a feed estimates them.
    """
    processor = load_processor(str(model))
    share = 1.0 if args.dense else args.keep
    samples = build_dataset(DataSection((str(data),)), (str(data),), Encoder(processor, 4096))
    feed = TokenBatches(
        samples,
        Collator(0),
        (processor.image_token_id,),
        Budget(1, packed=args.layout == "packed", keep=lambda step, total: share),
        Ranks(count=args.processes),
        seed=0,
        loading={"num_workers": 0, "prefetch_factor": None},
    )
    feed.estimate()
    lengths = feed.lengths(0)
    costs = [lengths.cost(samples.outline(i), share).tokens for i in range(len(samples))]
    limit = args.batch * fmean(costs)
    for _ in range(5):
        feed.budget = replace(feed.budget, tokens=round(limit))
        planned = PASSES * len(samples) / feed.forecast(PASSES)
        limit *= args.batch * args.processes / planned
    return round(limit), costs


def bound_of(costs: list[float], args: argparse.Namespace) -> float:
    """Work of the longest of the processes' fixed batches over the mean of all samples' work: what
    there is to gain, whatever the machine. Rows that are padded cost the longest one for each."""
    padded = args.dense or args.layout == "padded"
    rng = random.Random(0)

    def work() -> float:
        batch = rng.choices(costs, k=args.batch)
        return len(batch) * max(batch) if padded else sum(batch)

    longest = [max(work() for _ in range(args.processes)) for _ in range(10_000)]
    return float(fmean(longest) / (args.batch * fmean(costs)))


def one_run(
    folder: Path, data: Path, args: argparse.Namespace, kind: str, limit: int, turn: int
) -> dict[str, Any]:
    """One run of launch/train.py, and what it logged."""
    output = folder / f"{kind}-{turn}"
    recipe: dict[str, Any] = {
        "model": {"path": str(folder / "model")},
        "data": {
            "train": str(data),
            "val": str(folder / "other/train.json"),
            "max_length": 4096,
            "workers": 1,
        },
        "lora": {"r": 16, "alpha": 32, "train_projector": True, "modules_to_save": ["lm_head"]},
        "trainer": {
            "output_dir": str(output),
            "max_steps": args.steps,
            "per_device_train_batch_size": args.batch,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": max(args.steps // EVALUATIONS, 1),
            "per_device_eval_batch_size": 4,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": turn,
        },
    }
    if not args.dense:
        fixed = {"rule": "topk"}  # nothing to calibrate, which would take longer than the steps
        recipe["prune"] = {
            "keep": args.keep,
            "layout": args.layout,
            "stage1": fixed,
            "stage2": fixed,
        }
    if kind == "tokens":
        recipe["data"]["max_tokens_per_batch"] = limit
    path = folder / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    start = [sys.executable]
    if args.processes > 1:
        start += ["-m", "accelerate.commands.launch", "--config_file"]
        start += ["launch/accelerate/cpu2.yaml", "--num_processes", str(args.processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [*start, "launch/train.py", str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "rror: " in line]
        raise ValueError(f"a run failed: {lines[0] if lines else done.stderr}")
    return {"kind": kind, "round": turn, **read_run(output)}


def read_run(output: Path) -> dict[str, Any]:
    """What a run logged, without the steps that warm up."""
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    counted = steps[WARM_UP:]
    seconds = sum(step["step_time"] for step in counted)
    kept = [step["tokens_in"] * step["layer_average"] for step in counted]
    return {
        "tokens_per_s": sum(step["tokens_in"] for step in counted) / seconds,
        "kept_per_s": sum(kept) / seconds,
        "kept_per_step": fmean(kept),
        "samples_per_step": fmean(step["samples"] for step in counted),
        "step_s": seconds / len(counted),
        "losses": [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry],
    }


if __name__ == "__main__":
    sys.exit(main())
