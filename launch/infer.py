"""Answer a JSONL of questions with several processes, into one file in its order.

    accelerate launch --config_file launch/accelerate/cpu2.yaml launch/infer.py \
        --model outputs/run --jsonl in.jsonl --output out.jsonl
    torchrun --nproc-per-node 8 launch/infer.py --model … --jsonl … --output …
    python launch/infer.py --model … --jsonl … --output …

Each process takes every n-th batch and writes OUTPUT.rankN line by line; at the end the first one
folds these into OUTPUT. After a crash the same command, with any number of processes, goes on.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# A launcher puts this file's folder first on the path, where `train` would be launch/train.py.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from itprune.cli.question_lines import Line


def make_parser() -> argparse.ArgumentParser:
    """The options of `itprune infer` for files."""
    from itprune.cli.infer import add_file_options
    from itprune.cli.loading import add_model_options

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    add_file_options(parser)
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
    from itprune.cli.answer_file import AnswerFile
    from itprune.cli.answer_lines import answer_lines
    from itprune.cli.infer import check_file_options, load_answerer, progress
    from itprune.cli.question_lines import STDIN, QuestionLines
    from itprune.cli.sampling import decoding
    from train.together import own_device, wait

    if args.jsonl in (None, STDIN) or args.output in (None, STDIN):
        raise ValueError("give --jsonl and --output as files")
    check_file_options(args)
    args.device = own_device(args.device)
    source = QuestionLines.from_options(args, decoding(args))
    if rank == 0:  # folds in what an interrupted run left
        with AnswerFile.open(args.output, source.path, args.retry):
            pass
    wait(processes)
    with AnswerFile.part(args.output, rank) as out:
        earlier = len(out.done) // processes
        mine = share(out.left_over(source), args.batch_size, rank, processes)
        first = next(mine, None)
        if first is not None:
            answerer = load_answerer(args)
            total = (source.count() or 0) // processes
            with progress(total, earlier, args.quiet or rank > 0) as bar:
                lines = itertools.chain([first], mine)
                answer_lines(answerer, lines, source, out.write, args.batch_size, bar)
    wait(processes)
    if rank > 0:
        return 0
    with AnswerFile.open(args.output, source.path) as whole:
        return whole.tell()


def share(lines: Iterable[Line], size: int, rank: int, processes: int) -> Iterator[Line]:
    """Every n-th batch of the lines, so that slow stretches of a file are shared too."""
    for index, line in enumerate(lines):
        if index // size % processes == rank:
            yield line


if __name__ == "__main__":
    from train.launcher import leave

    leave(main())
