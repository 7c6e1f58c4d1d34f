"""`itprune merge`: fold LoRA into the base weights and keep the pruner.

The result is an ordinary model folder: transformers loads it and runs it dense, `itprune` loads it
with its pruner. The base is loaded unquantised, since rounding twice would change the answers, and
keeps its type. `itprune export` makes a folder to deploy, of any checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from itprune.cli.loading import DTYPES, check_folder, dtype_of, one_sentence
from itprune.cli.new_folder import new_folder

EXAMPLES = """\
examples:
  itprune merge --model outputs/run --output outputs/merged
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "merge",
        help="fold LoRA into the base weights, keep the pruner",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="FOLDER", help="an adapter's folder")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: the base's own")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Merges into a folder beside the output, which then takes its name: all or nothing."""
    folder, output = Path(args.model), Path(args.output)
    check_folder(folder)
    if not (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: holds no adapter (adapter_config.json), so nothing to merge")
    write_whole(folder, output, args.dtype)
    print(f"merged {folder} into {output}")
    return 0


def write_whole(
    folder: Path,
    output: Path,
    dtype: str | None,
    dense: bool = False,
    max_shard_size: str | None = None,
    to: str = "transformers",
) -> None:
    """Writes a checkpoint as an ordinary model folder, all of it or nothing.

    Args:
        folder: the checkpoint.
        output: a new folder.
        dtype: one of `DTYPES`; None: the base's own.
        dense: leave the pruner out.
        max_shard_size: of a file; None: as transformers has it.
        to: whom the folder is for: transformers, or vllm.

    Raises:
        ValueError: in one sentence.
    """
    with new_folder(output) as partial:
        from transformers.utils import logging

        from itprune.card import CARD_FILE, base_of, history_of, write_card
        from itprune.checkpoint import PRUNER_FILE
        from itprune.export import VLLM, check_reader, read_model, write_model
        from itprune.inputs import load_processor
        from itprune.vllm.folder import serving_section

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        with one_sentence(folder):
            processor = load_processor(folder)  # first: what it lacks is known before gigabytes
            check_reader(folder, to)
            model, parts = read_model(folder, None if dtype is None else dtype_of(dtype))
        source = None if dense else folder
        write_model(partial, model, processor, source, parts, max_shard_size, to)
        pruned = (partial / PRUNER_FILE).exists()
        if pruned or to == VLLM:
            history = history_of(folder)
            write_card(partial, name=output.name, base=base_of(folder), history=history)
        if to == VLLM:
            section = serving_section(model.config.model_type, output.name, pruned)
            with (partial / CARD_FILE).open("a", encoding="utf-8") as card:
                card.write(f"\n{section}\n")
