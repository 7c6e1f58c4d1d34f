"""The options of commands that answer: how long, and how tokens are drawn."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from itprune.decoding import Decoding


def add_sampling_options(parser: argparse.ArgumentParser, longest: int) -> None:
    """Adds them.

    Args:
        parser: of the command.
        longest: tokens of an answer, where the user does not say.
    """
    parser.add_argument(
        "--max-new-tokens", type=int, default=longest, metavar="N", help=f"default {longest}"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="default 0: greedy"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default 1.0")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling; default 0")


def decoding(args: argparse.Namespace) -> Decoding:
    """What they say.

    Raises:
        ValueError: one is out of range.
    """
    from itprune.decoding import Decoding

    return Decoding(args.max_new_tokens, args.temperature, args.top_p, args.seed)
