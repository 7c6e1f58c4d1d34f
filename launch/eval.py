"""Evaluate with several processes: `itprune eval`, its questions shared.

    accelerate launch --config_file launch/accelerate/cpu2.yaml launch/eval.py \
        --model outputs/run --task vqav2 --data questions.json,annotations.json --output evals
    torchrun --nproc-per-node 8 launch/eval.py --model … --task … --data … --output …
    python launch/eval.py --model … --task … --data … --output …

Each process takes every n-th batch, so the answers are those of one process. After a crash the same
command, with any number of processes, goes on.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

# A launcher puts this file's folder first on the path, where `train` would be launch/train.py.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def make_parser() -> argparse.ArgumentParser:
    """The options of `itprune eval`."""
    from itprune.cli.eval import add_options

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs this process's share; returns the exit status."""
    from train.together import start

    return start(make_parser().parse_args(argv), run)


def run(args: argparse.Namespace, rank: int, processes: int) -> int:
    """Answers the share of one process; the first one opens and closes the books.

    Raises:
        ValueError: anything the user can put right.
    """
    from itprune.cli.eval import make_evaluation, write
    from itprune.evaluating.settings import Team
    from train.together import own_device, wait

    args.device = own_device(args.device)
    team = Team(rank, processes, partial(wait, processes))
    evaluation = make_evaluation(args, team)
    evaluation.run()
    return write(evaluation) if rank == 0 else 0


if __name__ == "__main__":
    from train.launcher import leave

    leave(main())
