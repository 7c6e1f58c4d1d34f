"""Train from a recipe, under any launcher.

    python launch/train.py configs/quickstart.yaml
    deepspeed launch/train.py configs/lora_pruned.yaml trainer.max_steps=100
    accelerate launch --config_file launch/accelerate/cpu2.yaml launch/train.py CONFIG

A run whose output folder holds a checkpoint of the same recipe goes on from there.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from pathlib import Path

# A launcher puts this file's folder first on the path, where `train` would be this very file.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train.guards.stopping import StopRequest


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="recipe, a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="demand a checkpoint to go on from; without it a run looks for one",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="validate recipe and options, print the recipe resolved and stop",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None, stop: StopRequest | None = None) -> int:
    """Runs; returns the exit status.

    2 is for an error the user can put right before the run, 1 for what went wrong under way, 130
    for Ctrl-C, and 128 + the number of a signal that was met with a checkpoint.
    """
    options = make_parser().parse_intermixed_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # PEFT imports bitsandbytes, which tells every CPU user of an optional kernel it lacks.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return start(options, stop)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last place that can tell
        from train.guards.faults import told

        sentence, status, shared = told(error)
        rank = os.environ.get("RANK", "0")
        if sentence is None or options.traceback:
            traceback.print_exc()
        elif rank == "0" or not shared:
            place = "" if rank == "0" or shared else f" (rank {rank})"
            print(f"error{place}: {sentence}", file=sys.stderr)
        return status


def start(options: argparse.Namespace, stop: StopRequest | None) -> int:
    """Reads the recipe and does what the command line asks for."""
    from train.launcher import read_launch
    from train.recipe.config import load_recipe

    launch = read_launch(options.local_rank)
    recipe = load_recipe(options.config, options.overrides)
    if options.check:
        from train.check import check

        check(recipe, launch)
        print(recipe.to_yaml(), end="")
        return 0
    from train.run import run

    run(recipe, launch, options.resume, stop)
    return 0


if __name__ == "__main__":
    request = StopRequest()
    request.listen()  # before anything else starts threads
    from train.launcher import leave

    leave(main(stop=request))
