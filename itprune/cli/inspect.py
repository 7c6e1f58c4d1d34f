"""`itprune inspect`: see what is kept of pictures and prompts, as pictures and one HTML page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from itprune.cli.loading import add_model_options, check_least, check_options, load

if TYPE_CHECKING:
    from itprune.checkpoint import Loaded
    from itprune.inspecting.run import Asked

EXAMPLES = """\
examples:
  itprune inspect --model outputs/run --image a.png --prompt "Which digit?" --output build/see
  itprune inspect --model outputs/run --data val.json --limit 20 --output build/see
  itprune inspect --model outputs/run --data val.json --method visionzip --output build/v

Then open build/see/index.html. A model that was not tuned with a pruner wears `itprune`.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "inspect",
        help="see what is kept of pictures and prompts",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="may be given several times"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="the question: one for each --image, or one for all",
    )
    parser.add_argument("--data", metavar="FILE", help="LLaVA JSON or JSONL instead of pairs")
    parser.add_argument(
        "--limit", type=int, default=20, metavar="N", help="of --data, its first N; default 20"
    )
    parser.add_argument(
        "--image-root",
        metavar="FOLDER",
        help="pictures of --data are looked for, and only opened, here; default: its own folder",
    )
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="a new folder, or our own"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default 64")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the folder; what can be refused without the model is refused before."""
    check_options(args)
    from tqdm import tqdm

    from itprune.decoding import Decoding
    from itprune.inspecting.folder import OutputFolder
    from itprune.inspecting.run import inspect_questions

    Decoding(args.max_new_tokens)  # refuses what is no number of tokens
    folder = OutputFolder(Path(args.output))
    asked = questions(args)
    loaded = load_pruned(args)
    bar: Iterable[Asked] = tqdm(asked, disable=args.quiet, unit="question", file=sys.stderr)
    written = inspect_questions(loaded, bar, folder, args.model, args.max_new_tokens)
    print(written)
    return 0


def questions(args: argparse.Namespace) -> Iterable[Asked]:
    """The questions the options name.

    Raises:
        ValueError: in one sentence.
    """
    from itprune.inspecting.run import Records, pairs

    if args.data is None:
        return pairs(args.image, args.prompt)
    if args.image or args.prompt:
        raise ValueError("give either --data or pairs of --image and --prompt")
    check_least(args, limit=1)
    root = None if args.image_root is None else Path(args.image_root)
    if root is not None and not root.is_dir():
        raise ValueError(f"--image-root {root}: no such folder")
    return Records(Path(args.data), root, args.limit)


def load_pruned(args: argparse.Namespace) -> Loaded:
    """Loads the model with a pruner: the one asked for, its own, or `itprune`.

    Raises:
        ValueError: anything that stands against it, in one sentence.
    """
    from itprune.checkpoint import PRUNER_FILE

    if (Path(args.model) / PRUNER_FILE).exists() or args.method is not None:
        return load(args)
    loaded = load(args, method="itprune")
    if args.keep is None and loaded.attached is not None:
        loaded.attached.set_keep(None)  # nothing is calibrated, so no target could be met
    return loaded
