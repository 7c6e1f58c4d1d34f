"""`itprune doctor`: what pruning would meet in a model's folder, or what a recipe would do here,
before anything is run.

Of a model (--model): family, encoder and score, what a picture of a given size becomes, where the
stages act, which methods run on it and what is missing on this machine. Of a recipe (CONFIG):
whether it would start, what a sample of its data holds, what would be learnt and kept of it, steps,
memory of a process and room on the disk; the exit status is 1 where the run would not start. Reads
no weights.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from itprune.cli.child import run_child
from itprune.cli.loading import check_choices, check_folder, check_least, first_line
from itprune.cli.train import add_recipe
from itprune.project import find_project

if TYPE_CHECKING:
    from itprune.doctor import Diagnosis, Picture, Pruning

WIDTH = 100
SIZE = (448, 448)
SAMPLES = 64
HINTS = {"--method": "; write prune.method=…", "--keep": "; write prune.keep=…"}
MOST = 16_384
"""Pixels of a side: no picture is made larger to be counted."""
EXAMPLES = """\
examples:
  itprune doctor --model Qwen2.5-VL-7B-Instruct --image-size 1280x720
  itprune doctor --model outputs/run --method fastv --keep 0.5 --json
  itprune doctor configs/lora_pruned.yaml
  itprune doctor configs/lora_pruned.yaml prune.keep=0.33 --nproc 8 --samples 200
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="tell what a recipe would do here, or what pruning would meet in a model",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe(parser, nargs="?")
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="of a recipe: processes; default: one a GPU"
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="of a recipe: that are encoded; default 64"
    )
    parser.add_argument(
        "--model", metavar="FOLDER", help="a checkpoint, or an ordinary model folder"
    )
    parser.add_argument(
        "--image-size",
        metavar="WxH",
        help=f"pixels of the picture that is counted; default {SIZE[0]}x{SIZE[1]}",
    )
    parser.add_argument(
        "--method", metavar="NAME", help="default: the checkpoint's, or itprune; several: a+b"
    )
    parser.add_argument(
        "--keep", type=float, metavar="FRACTION", help="default: the checkpoint's, or 0.22"
    )
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the findings.

    Raises:
        ValueError: no such model, method or picture, or options that do not go together.
    """
    if (args.config is None) == (args.model is None):
        raise ValueError("give either a recipe or --model FOLDER")
    of_model = {"--image-size": args.image_size, "--method": args.method, "--keep": args.keep}
    of_recipe = {"--nproc": args.nproc, "--samples": args.samples}
    whole, other = ("--model", of_recipe) if args.model is not None else ("a recipe", of_model)
    for name, value in other.items():
        if value is not None:
            raise ValueError(f"{name}: does not go with {whole}{HINTS.get(name, '')}")
    if args.model is not None and args.overrides:
        raise ValueError(f"{args.overrides[0]}: overrides belong to a recipe, not to --model")
    return _of_recipe(args) if args.model is None else _of_model(args)


def _of_recipe(args: argparse.Namespace) -> int:
    """Training is no part of the library, so its own entry point looks."""
    if not Path(args.config).is_file():
        raise ValueError(f"{args.config}: no such recipe")
    check_least(args, nproc=1, samples=1)
    script = str(find_project().script("doctor.py"))
    words = [args.config, *args.overrides, "--samples", str(args.samples or SAMPLES)]
    words += ["--nproc", str(args.nproc)] if args.nproc is not None else []
    words += [f"--{name}" for name in ("json", "traceback") if vars(args)[name]]
    return run_child([sys.executable, script, *words])


def _of_model(args: argparse.Namespace) -> int:
    size = SIZE if args.image_size is None else _size(args.image_size)
    check_choices(args.method, args.keep)
    check_folder(Path(args.model))
    from transformers.utils import logging

    from itprune.doctor import examine

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        found = examine(Path(args.model), size, args.method, args.keep)
    except (OSError, RuntimeError, ImportError, KeyError) as error:
        raise ValueError(f"{args.model}: cannot be examined ({first_line(error)})") from error
    if args.json:
        print(json.dumps(found.to_dict(), indent=1, ensure_ascii=False))
    else:
        print("\n".join(describe(found)))
    return 0


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or not all(1 <= int(side) <= MOST for side in match.groups()):
        raise ValueError(
            f"--image-size: must be width x height in pixels up to {MOST}, such as 1280x720, got "
            f"{text!r}"
        )
    return int(match[1]), int(match[2])


# ------------------------------------------------------------------------------------ in words
def describe(found: Diagnosis) -> Iterator[str]:
    """The findings, for people."""
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    axes = f", {found.position_axes} position ids a token" if found.position_axes > 1 else ""
    rows = {
        "model": f"{found.model}: family {found.family} ({found.model_class}); {versions}",
        "LLM": f"layers 0 to {found.llm_layers - 1} of width {found.llm_width}{axes}",
        "encoder": f"blocks 0 to {found.vision_blocks - 1}; score: {found.score} in block "
        f"{found.score_block}; methods act on {found.acts_on}",
        "picture": _picture(found.picture),
        "pruning": "this method cannot run here" if found.pruning is None else "",
    }
    for name, text in rows.items():
        if text:
            yield from _row(name, text)
    if found.pruning is not None:
        yield from _pruning(found.pruning, found)
    yield from _row("methods", _names(found.runs))
    for reason, names in _reasons(found.refused).items():
        yield from _row("refused", f"{', '.join(names)}: {reason}")
    for sentence in found.missing or ("nothing",):
        yield from _row("missing", sentence)


def _picture(picture: Picture | None) -> str:
    if picture is None:
        return "not counted: there is no processor to make it with"
    grids = " + ".join(f"{rows}x{columns}" for rows, columns in picture.grids)
    extra = f" + {picture.separators} separators" if picture.separators else ""
    width, height = picture.size
    return (
        f"{width}x{height} pixels -> {picture.visual_tokens} visual tokens, in rows x columns: "
        f"{grids}{extra}"
    )


def _pruning(pruning: Pruning, found: Diagnosis) -> Iterator[str]:
    goal = "as its rule decides" if pruning.keep is None else f"keep {pruning.keep:g}"
    count = None
    if found.picture is not None:
        count = found.picture.visual_tokens - found.picture.separators
    if pruning.keep is not None and count is not None:
        goal += (
            f": {round(pruning.keep * count)} of {count} visual tokens, averaged over the LLM's "
            "layers and over pictures"
        )
    yield from _row("pruning", f"{pruning.method}, {goal}; {pruning.positions} positions")
    shares = list(pruning.shares or [])
    if pruning.before_llm:
        yield from _row("stage 1", "before the LLM" + _aim(shares[:1], count))
    if pruning.layers:
        behind = [_aim([share], count) for share in shares[1:]] or [""] * len(pruning.layers)
        each = (f"{k}{aim}" for k, aim in zip(pruning.layers, behind, strict=True))
        yield from _row("stage 2", f"after layer {', '.join(each)}")
    if not pruning.before_llm and not pruning.layers:
        yield from _row("stages", "none: every visual token stays in every layer")


def _aim(shares: list[float], count: int | None) -> str:
    if not shares:
        return ""
    tokens = "" if count is None else f", {round(shares[0] * count)} tokens"
    return f" ({shares[0]:.1%}{tokens})"


def _names(runs: Sequence[str]) -> str:
    from itprune.methods import method_class

    trained = {name for name in runs if method_class(name).card.training == "required"}
    listed = ", ".join(f"{name}*" if name in trained else name for name in runs)
    return listed + ("  (*: has parts to train first)" if trained else "")


def _reasons(refused: Mapping[str, str]) -> dict[str, list[str]]:
    """Methods by the reason, told without the option, the name and the list of other methods."""
    found: dict[str, list[str]] = {}
    for name, reason in refused.items():
        told = reason.removeprefix(f"prune.method: {name} ").partition("; choose one of")[0]
        found.setdefault(re.sub(rf"\b{name}\b", "it", told), []).append(name)
    return found


def _row(name: str, text: str) -> Iterator[str]:
    return iter(
        textwrap.wrap(
            f"{name:9}{text}",
            WIDTH,
            subsequent_indent=" " * 9,
            break_long_words=False,
            break_on_hyphens=False,
        )
    )
