"""`itprune compare`: accuracy, tokens and time of methods on one checkpoint and one data set.

`dense`, `random` and `downsample` are always among them. Each method is run at every budget; those
that calibrate are fitted to a part of the data that is not scored. All times come from one
interleaved run. A second call with the same folder does only what is missing.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from itprune.cli.loading import DTYPES, check_folder, check_least, load_as_saved, numbers

if TYPE_CHECKING:
    from itprune.comparing.run import Settings

EXAMPLES = """\
an entry of --methods:
  visionzip                            with its default options
  itprune:stage2.layers=[4]:stage1.keep=0.3
  visionzip+pyramiddrop                several at their own places (see `itprune methods`)

examples:
  itprune compare --model outputs/dense --data val.json --methods topk_cls,itprune --output cmp
  itprune compare --model outputs/dense --data val.json --methods visionzip --keep 0.11,0.22 \\
      --limit 200 --output cmp
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "compare",
        help="accuracy, tokens and time, method against method",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="a checkpoint, or an ordinary model folder"
    )
    parser.add_argument(
        "--data", required=True, metavar="PATH", help="LLaVA JSON or JSONL with answers"
    )
    parser.add_argument(
        "--methods", default="", metavar="A,B,C", help="entries; default: all that are registered"
    )
    parser.add_argument(
        "--keep", default="0.11,0.22,0.44", metavar="A,B,C", help="default 0.11,0.22,0.44"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="rows, tables, picture")
    parser.add_argument(
        "--image-root", metavar="FOLDER", help="images of the data; default: its own folder"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="samples to score; default: all")
    parser.add_argument(
        "--calibration",
        type=int,
        default=64,
        metavar="N",
        help="samples set aside to calibrate on, at most a quarter; default 64",
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="asked and timed; default 8"
    )
    parser.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help="default 16")
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="timed rounds; 0: none; default 5"
    )
    parser.add_argument(
        "--seeds", default="0,1,2", metavar="A,B", help="of methods with a seed; default 0,1,2"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="CPU threads while timing; default 1, where CPU seconds are measured",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 …; default: a GPU where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights")
    parser.add_argument("--retry", action="store_true", help="try again what was left out before")
    parser.add_argument("--retime", action="store_true", help="time everything again, in one run")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compares and writes; 0 when it is done."""
    settings = _settings(args)
    check_folder(settings.model)
    keeps, seeds = (
        numbers("--keep", args.keep, float),
        numbers("--seeds", args.seeds, int),
    )
    from itprune.comparing.entries import make_cases, parse_entries
    from itprune.comparing.plot import draw_pareto
    from itprune.comparing.run import Comparison
    from itprune.comparing.tables import write_tables
    from itprune.methods import methods

    entries = parse_entries(args.methods or ",".join(methods()))
    comparison = Comparison(
        settings,
        make_cases(entries, keeps, seeds),
        lambda: load_as_saved(args),
        lambda line: None if args.quiet else print(line, file=sys.stderr, flush=True),
    )
    comparison.run()
    lines = comparison.lines()
    try:
        print(write_tables(settings.output, comparison.head(), lines))
    except OSError as error:
        raise ValueError(f"{settings.output}: cannot be written ({error.strerror})") from None
    written = ["rows.jsonl", "compare.csv", "compare.json", "compare.md"]
    try:
        draw_pareto(lines, settings.output / "pareto.png")
        written.append("pareto.png")
    except ValueError as error:
        warnings.warn(f"no pareto.png: {error}", stacklevel=1)
    print(f"{settings.output}: {', '.join(written)}")
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    import torch

    from itprune.comparing.run import Settings

    check_least(args, limit=1, calibration=1, batch_size=1, max_new_tokens=1, threads=1, rounds=0)
    data = Path(args.data)
    root = data.parent if args.image_root is None else Path(args.image_root)
    if not root.is_dir():
        raise ValueError(f"--image-root {root}: no such folder")
    return Settings(
        model=Path(args.model),
        data=data,
        image_root=root,
        output=Path(args.output),
        limit=args.limit,
        calibration=args.calibration,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        rounds=args.rounds,
        threads=args.threads,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=args.dtype,
        retry=args.retry,
        retime=args.retime,
    )
