"""Options and checks that all commands which load a model share.

What can be known without reading gigabytes is checked first, and what transformers or PEFT report
about a folder becomes one sentence.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError

if TYPE_CHECKING:
    from itprune.checkpoint import Loaded

T = TypeVar("T")
DTYPES = ("float32", "bfloat16", "float16")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model, --keep, --method, --device and --dtype."""
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="a checkpoint, or an ordinary model folder"
    )
    add_loading_options(parser)


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """--keep, --method, --device and --dtype."""
    parser.add_argument(
        "--keep",
        type=float,
        metavar="FRACTION",
        help="average fraction of visual tokens kept instead of the checkpoint's; 1.0: dense",
    )
    parser.add_argument(
        "--method",
        metavar="NAME",
        help="choose tokens by this method, or several: a+b (see `itprune methods`)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 …; default: a GPU where there is one")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; default: float32 on a CPU, else their own"
    )


def load(args: argparse.Namespace, **changes: Any) -> Loaded:
    """Loads what the options name.

    Args:
        args: options of `add_model_options`.
        changes: keywords for `load_pretrained` that replace those of the options.

    Raises:
        ValueError: anything that stands against it, in one sentence.
    """
    check_options(args)
    import torch
    from transformers.utils import logging

    from itprune.checkpoint import load_pretrained

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # refusals come as exceptions; the rest is not for users
    wanted: dict[str, Any] = {
        "keep": args.keep,
        "method": args.method,
        "device": args.device,
        "dtype": None if args.dtype is None else dtype_of(args.dtype),
    }
    if str(args.device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: this machine has no CUDA device; use cpu")
    with one_sentence(Path(args.model)):
        return load_pretrained(args.model, **{**wanted, **changes})


def load_as_saved(args: argparse.Namespace) -> Loaded:
    """The model with what its checkpoint says, for commands whose --keep is a list of budgets.

    Raises:
        ValueError: anything that stands against it, in one sentence.
    """
    options = {name: vars(args)[name] for name in ("model", "device", "dtype")}
    return load(argparse.Namespace(**options, keep=None, method=None))


def numbers(option: str, text: str, kind: Callable[[str], T]) -> list[T]:
    """The numbers of an option, joined by commas.

    Raises:
        ValueError: something else, or none.
    """
    try:
        found = [kind(piece) for piece in text.split(",") if piece.strip()]
    except ValueError:
        found = []
    if not found:
        raise ValueError(f"{option}: must be numbers joined by commas, got {text!r}")
    return found


def check_least(args: argparse.Namespace, **least: int) -> None:
    """Refuses numbers that are too small.

    Args:
        args: the options.
        least: name of an option -> the least it may be; None is always right.

    Raises:
        ValueError: in one sentence.
    """
    for name, low in least.items():
        value = vars(args)[name]
        if value is not None and value < low:
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: must be at least {low}, got {value}")


@contextmanager
def one_sentence(folder: Path) -> Iterator[None]:
    """What transformers, PEFT and others say about a folder that cannot be loaded, in one line."""
    try:
        yield
    except (OSError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        raise ValueError(f"{folder}: cannot be loaded ({first_line(error)})") from error
    except ValueError as error:
        raise ValueError(first_line(error)) from error


def check_options(args: argparse.Namespace) -> None:
    """Refuses options and folders that cannot work, before anything is loaded.

    Raises:
        ValueError: in one sentence.
    """
    check_choices(args.method, args.keep)
    check_folder(Path(args.model))


def check_choices(method: str | None, keep: float | None) -> None:
    """Refuses a method nobody knows and a keep that is no fraction.

    Raises:
        ValueError: in one sentence.
    """
    from itprune.methods import methods
    from itprune.methods.combined import SEPARATOR
    from itprune.options import check_choice, check_fraction

    check_fraction("--keep", keep)
    if method is not None:
        for name in method.split(SEPARATOR):
            check_choice("--method", name, methods())


def check_folder(folder: Path) -> None:
    """Refuses a folder that holds no supported model.

    Raises:
        ValueError: in one sentence.
    """
    from itprune.families import family_class

    if not folder.is_dir():
        raise ValueError(f"{folder}: no such checkpoint folder")
    if (folder / "adapter_config.json").exists():
        return
    if not (folder / "config.json").exists():
        inner = sorted(folder.glob("checkpoint-*/adapter_config.json"))
        hint = f"; did you mean {inner[-1].parent}?" if inner else ""
        raise ValueError(
            f"{folder}: not a model, it holds neither config.json nor adapter_config.json{hint}"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        family = config["model_type"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / 'config.json'}: not a model's configuration") from None
    try:
        family_class(family)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def dtype_of(name: str) -> Any:
    """torch's type of one of `DTYPES`."""
    import torch

    return {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }[name]


def first_line(error: Exception) -> str:
    """What an error says first; its kind where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
