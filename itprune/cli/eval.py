"""`itprune eval`: a benchmark on one checkpoint, dense and at every budget.

`dense`, `random` and `downsample` are always there, beside the checkpoint's own method or those of
--methods. Answers are kept batch by batch: a call that was stopped goes on, a call with more
methods or budgets asks only what is missing, and several calls may share a folder.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from itprune.cli.loading import DTYPES, check_folder, check_least, load_as_saved, numbers

if TYPE_CHECKING:
    from itprune.evaluating.run import Evaluation
    from itprune.evaluating.settings import Team

EXAMPLES = """\
examples:
  itprune eval --model outputs/run --task records --data val.json --output evals
  itprune eval --model outputs/run --task vqav2 --data questions.json,annotations.json \\
      --image-root val2014 --keep 0.11,0.22,0.44 --output evals
  itprune eval --model outputs/dense --task pope --data coco_pope_random.json \\
      --image-root val2014 --methods visionzip,itprune --limit 500 --output evals
"""
DEFAULT_METHOD = "itprune"
"""For a model that was not tuned with a method."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "eval",
        help="a benchmark: accuracy over keep",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.set_defaults(run=run)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options, also those of launch/eval.py."""
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="a checkpoint, or an ordinary model folder"
    )
    parser.add_argument("--task", required=True, metavar="NAME", help="see docs/evaluate.md")
    parser.add_argument(
        "--data", required=True, metavar="FILE[,FILE]", help="the task's files, joined by commas"
    )
    parser.add_argument(
        "--image-root", metavar="FOLDER", help="images; default: the folder of the first file"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the task, such as instruction=…; may be given several times",
    )
    parser.add_argument(
        "--methods", default="", metavar="A,B+C", help="entries; default: the checkpoint's own"
    )
    parser.add_argument(
        "--keep", default="0.11,0.22,0.44", metavar="A,B,C", help="default 0.11,0.22,0.44"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="answers, tables, picture")
    _add_numbers(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 …; default: a GPU where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights")
    parser.add_argument("--retry", action="store_true", help="ask again what failed before")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _add_numbers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=int, metavar="N", help="questions to score; default: all")
    parser.add_argument(
        "--calibration",
        type=int,
        default=64,
        metavar="N",
        help="samples to calibrate on, at most a quarter of the data; default 64",
    )
    parser.add_argument(
        "--calibration-data",
        metavar="FILE",
        help="LLaVA JSON or JSONL to take them from instead; then every question is scored",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help="default 16")
    parser.add_argument(
        "--seeds", default="0,1,2", metavar="A,B", help="of methods with a seed; default 0,1,2"
    )
    parser.add_argument(
        "--max-bad",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="of the questions that may be unreadable and are left out; default 0.01",
    )


def run(args: argparse.Namespace) -> int:
    """Evaluates and writes; 0 when it is done."""
    evaluation = make_evaluation(args)
    evaluation.run()
    return write(evaluation)


def make_evaluation(args: argparse.Namespace, team: Team | None = None) -> Evaluation:
    """What the options ask for; what can be checked without the model is checked.

    Args:
        args: options of `add_options`.
        team: the processes that share it; None: this one alone.

    Raises:
        ValueError: in one sentence.
    """
    _check_numbers(args)
    check_folder(Path(args.model))
    keeps, seeds = numbers("--keep", args.keep, float), numbers("--seeds", args.seeds, int)
    import torch

    from itprune.comparing.entries import make_cases, parse_entries
    from itprune.evaluating.questions import split
    from itprune.evaluating.run import Evaluation
    from itprune.evaluating.settings import Settings
    from itprune.tasks import find_task

    cases = make_cases(parse_entries(args.methods or _own_method(Path(args.model))), keeps, seeds)
    root = None if args.image_root is None else Path(args.image_root)
    files = [Path(name.strip()) for name in args.data.split(",") if name.strip()]
    task = find_task(args.task).read(files, root, _options(args.option))
    other = None if args.calibration_data is None else Path(args.calibration_data)
    parts = split(task, args.limit, args.calibration, other)
    settings = Settings(
        model=Path(args.model),
        output=Path(args.output),
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        max_bad=args.max_bad,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=args.dtype,
        retry=args.retry,
    )
    quiet = args.quiet or (team is not None and team.rank > 0)
    tell = None if quiet else (lambda line: print(line, file=sys.stderr, flush=True))
    return Evaluation(task, parts, settings, cases, lambda: load_as_saved(args), team, tell)


def write(evaluation: Evaluation) -> int:
    """Joins the answers and writes tables and picture; 0 when it is done.

    Raises:
        ValueError: too many questions cannot be read, or a file cannot be written.
    """
    from itprune.evaluating.plot import draw_pareto
    from itprune.evaluating.runs import all_runs
    from itprune.evaluating.tables import section, write_tables

    output = evaluation.settings.output
    try:
        mine = evaluation.finish()
        runs = all_runs(output)
        write_tables(output, runs)
        print("\n".join(section(next(run for run in runs if run.head["run"] == mine.head["run"]))))
        written = ["eval.json", "eval.csv", "eval.md"]
        try:
            draw_pareto(runs, output / "pareto.png")
            written.append("pareto.png")
        except ValueError as error:
            warnings.warn(f"no pareto.png: {error}", stacklevel=1)
    except OSError as error:
        raise ValueError(f"{output}: cannot be written ({error.strerror})") from None
    print(f"{output}: {', '.join(written)}; answers in {evaluation.folder}")
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    check_least(args, limit=1, calibration=0, batch_size=1, max_new_tokens=1)
    if not 0 <= args.max_bad < 1:
        raise ValueError(f"--max-bad: must be in [0, 1), got {args.max_bad:g}")


def _options(given: list[str]) -> dict[str, str]:
    """The task's options."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--option: must be NAME=VALUE, got {text!r}")
        found[name] = value
    return found


def _own_method(folder: Path) -> str:
    """The method a checkpoint was tuned with."""
    from itprune.checkpoint import PRUNER_FILE, PrunerRecord

    if not (folder / PRUNER_FILE).exists():
        return DEFAULT_METHOD
    return PrunerRecord.read(folder).config.method
