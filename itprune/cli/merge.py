"""`itprune merge`: fold LoRA into the base weights and keep the pruner.

The result is an ordinary model folder: transformers loads it and runs it dense, `itprune` loads it
with its pruner. The base is loaded unquantised, since rounding twice would change the answers.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from itprune.cli.loading import DTYPES, check_folder, load


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "merge",
        help="fold LoRA into the base weights, keep the pruner",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="FOLDER", help="an adapter's folder")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: the base's own")
    parser.set_defaults(run=run, keep=None, method=None, device="cpu")


def run(args: argparse.Namespace) -> int:
    """Merges into a folder beside the output, which then takes its name: all or nothing."""
    folder, output = Path(args.model), Path(args.output)
    check_folder(folder)
    if not (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: holds no adapter (adapter_config.json), so nothing to merge")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: exists already; name a new folder")
    partial = output.with_name(f"{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{output}: cannot be written ({error.strerror})") from None

    from itprune.checkpoint import PRUNER_FILE, PrunerRecord, save_pretrained

    loaded = load(args, merge=True, **({} if args.dtype else {"dtype": "auto"}))
    known = (folder / PRUNER_FILE).exists()
    recipe = PrunerRecord.read(folder).recipe if known else None
    try:
        save_pretrained(partial, loaded.model, loaded.processor, loaded.attached, recipe)
    except OSError as error:
        raise ValueError(f"{output}: cannot be written ({error.strerror})") from None
    os.replace(partial, output)
    print(f"merged {folder} into {output}")
    return 0
