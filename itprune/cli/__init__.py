"""The `itprune` command. A subcommand is a module with `add_parser(subparsers)` and `run(args)`.

Its heavy imports stand inside `run`, so that help is quick. Exit status: 0 done; 1 an error the
user can put right, told in one sentence on stderr; 2 a command line that cannot be read.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from itprune.cli.terminal import harmless

COMMANDS = (
    "train", "infer", "chat", "app", "serve", "encode", "inspect", "eval", "compare", "report",
    "merge", "export", "calibrate", "methods", "doctor", "env", "bench",
)  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="itprune", description="Run multimodal LLMs on the tokens that matter."
    )
    parser.add_argument("--version", action="version", version=f"itprune {version('itprune')}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"itprune.cli.{name}").add_parser(commands)
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; overrides of a recipe may stand behind options, too."""
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and ("overrides" not in args or any(w.startswith("-") or "=" not in w for w in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    args = parse(argv)
    # PEFT imports bitsandbytes, which tells every CPU user of an optional kernel it lacks.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Imported by transformers where it is installed, it tells them on stdout that there is no GPU.
    logging.getLogger("DeepSpeed").disabled = True
    try:
        with _short_warnings():
            return args.run(args)
    except ValueError as error:
        if args.traceback:
            raise
        print(harmless(f"itprune: error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("itprune: stopped; what was written stays", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder that went away
        if args.traceback:
            raise
        print(harmless(f"itprune: error: {error}; what was written stays"), file=sys.stderr)
        return 1


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings as one line for people, without our source code."""

    def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        print(harmless(f"itprune: warning: {message}"), file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        for kind in (FutureWarning, DeprecationWarning):  # for developers
            warnings.filterwarnings("ignore", category=kind)
        yield
