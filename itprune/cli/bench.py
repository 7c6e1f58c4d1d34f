"""`itprune bench`: what pruning is worth on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from itprune.cli.loading import check_least


def add_parser(subparsers: Any) -> None:
    """Adds the command `bench` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="measure step time, FLOPs and memory, dense beside pruned",
        description="Runs dense and pruned variants of a model with random weights in turns and "
        "prints time, speed-up, counted FLOPs and memory.",
    )
    parser.add_argument(
        "what",
        choices=("train", "infer", "methods", "eval", "serve"),
        help="a training step; inference; the prefill of every method and what choosing costs; "
        "answers per second; or many requests at once through the server",
    )
    parser.add_argument(
        "--shape",
        default="cpu",
        metavar="NAME",
        help="tiny (seconds), cpu (50 M parameters, some minutes), next-like, qwen2.5-vl-like and "
        "qwen2.5-vl-32b-like (more than 2,000 visual tokens), llava-1.5-7b (CUDA GPU); default cpu",
    )
    parser.add_argument(
        "--batch", type=int, help="rows of a batch; default: the shape's, 2 or 8 (infer: 1, too)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds; default 5")
    parser.add_argument("--keep", type=float, default=0.22, help="visual tokens kept; default 0.22")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads; default 1, where CPU seconds are measured; more: the wall clock",
    )
    parser.add_argument(
        "--methods",
        default="",
        metavar="A,B",
        help="bench methods: entries as `itprune compare` takes them, dense and the controls are "
        "always there; default: all that need no training",
    )
    parser.add_argument(
        "--questions",
        type=int,
        default=1,
        metavar="N",
        help="bench eval: questions about each picture of a batch; default 1",
    )
    parser.add_argument(
        "--requests",
        type=int,
        metavar="N",
        help="bench serve: requests that come at once; default 64",
    )
    parser.add_argument(
        "--http",
        action="store_true",
        help="bench serve: through the real endpoint, by the wall clock, instead of its core alone",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the record there, too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the bench; 0 when it is done.

    Raises:
        ValueError: an impossible shape or number.
    """
    from itprune.bench import bench_eval, bench_infer, bench_methods, bench_train
    from itprune.bench.table import render

    check_least(args, batch=1, repeats=1, threads=1, questions=1, requests=1)
    if args.json is not None and not args.json.parent.is_dir():
        raise ValueError(f"--json: there is no folder {args.json.parent}")
    if args.methods and args.what != "methods":
        raise ValueError(f"--methods: belongs to `itprune bench methods`, not to {args.what}")
    if args.questions > 1 and args.what != "eval":
        raise ValueError(f"--questions: belongs to `itprune bench eval`, not to {args.what}")
    _check_serve(args)
    common = {
        "shape": args.shape,
        "repeats": args.repeats,
        "keep": args.keep,
        "threads": args.threads,
        "progress": lambda line: print(line, file=sys.stderr, flush=True),
    }
    if args.what == "train":
        record = bench_train(batch=args.batch, **common)
    elif args.what == "methods":
        record = bench_methods(batch=args.batch, names=args.methods, **common)
    elif args.what == "eval":
        record = bench_eval(batch=args.batch, questions=args.questions, **common)
    elif args.what == "serve":
        record = _serve(args, common)
    else:
        record = bench_infer(batches=(args.batch,) if args.batch else None, **common)
    print(render(record))
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


def _check_serve(args: argparse.Namespace) -> None:
    """Raises ValueError: an option that belongs to another bench."""
    serves = args.what == "serve"
    given = {"--requests": args.requests is not None, "--http": args.http}
    for option, there in given.items():
        if there and not serves:
            raise ValueError(f"{option}: belongs to `itprune bench serve`, not to {args.what}")
    if serves and args.batch is not None:
        raise ValueError("--batch: `itprune bench serve` takes --requests instead")


def _serve(args: argparse.Namespace, common: dict[str, Any]) -> dict[str, Any]:
    """The record of `itprune bench serve`, which needs the packages of the endpoint."""
    try:
        from itprune.bench.serving import REQUESTS, bench_serve
    except ImportError as error:
        raise ValueError(
            f"itprune bench serve needs a package that is not installed ({error.name}): "
            "pip install 'itprune[serve]'"
        ) from None
    return bench_serve(requests=args.requests or REQUESTS, http=args.http, **common)
