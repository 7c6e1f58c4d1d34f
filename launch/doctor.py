"""Tell what a recipe would do here, without training and without reading weights.

    python launch/doctor.py configs/lora_pruned.yaml prune.keep=0.33 --nproc 8
    python launch/doctor.py configs/lora_pruned.yaml --samples 200 --json

Exit status: 0 the run would start, 1 it would not.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path

# This file's folder stands first on the path, where `train` would be launch/train.py.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="recipe, a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe"
    )
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="processes; default: one a GPU, 1 on a CPU"
    )
    parser.add_argument(
        "--samples", type=int, default=64, metavar="N", help="that are encoded; default 64"
    )
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Examines; returns the exit status."""
    options = make_parser().parse_intermixed_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from transformers.utils import logging as chatter

        from train.doctor.examine import examine, usual_processes
        from train.doctor.text import describe
        from train.recipe.config import load_recipe

        chatter.set_verbosity_error()
        recipe = load_recipe(options.config, options.overrides)
        processes = options.nproc or usual_processes(recipe)
        found = examine(recipe, options.config, processes, options.samples)
    except ValueError as error:
        if options.traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(found.to_dict(), indent=1, ensure_ascii=False))
    else:
        print("\n".join(describe(found)))
    return 0 if found.starts else 1


if __name__ == "__main__":
    sys.exit(main())
