"""`itprune export`: a folder to deploy, of any checkpoint.

Adapters are merged into their base; a whole model is written as it is; where a checkpoint holds
nothing but the shards of DeepSpeed (ZeRO-1/2/3) or FSDP, these are put together. The result has
safetensors in bfloat16 under transformers' own names, the processor and, unless --dense,
pruner.json; transformers loads it and runs it dense, `itprune` loads it with its pruner. It is read
back and compared before it takes its name. Merging takes 4 bytes of memory a weight.

--to vllm gives the weights the names vLLM looks for, which transformers reads, too, and writes the
commands that serve the folder into its README.md (docs/serve_vllm.md).

Shards are Python pickles. Only those of the folder you name are read, and a file that names
anything but what DeepSpeed and torch write themselves is refused.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from itprune.cli.loading import DTYPES, check_folder
from itprune.cli.merge import write_whole

READERS = ("transformers", "vllm")
SIZE = re.compile(r"[1-9]\d*(\.\d+)?(KB|MB|GB)")
EXAMPLES = """\
examples:
  itprune export --model outputs/run --output outputs/deployed
  itprune export --model outputs/run/checkpoint-500 --output outputs/at500 --max-shard-size 2GB
  itprune export --model outputs/run --output outputs/dense --dense --dtype float32
  itprune export outputs/run --to vllm                     # writes outputs/run-vllm
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "export",
        help="write a folder to deploy: whole, safetensors, bfloat16",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    checkpoint = parser.add_mutually_exclusive_group(required=True)
    checkpoint.add_argument("folder", nargs="?", metavar="FOLDER", help="a checkpoint")
    checkpoint.add_argument("--model", metavar="FOLDER", help="the same")
    parser.add_argument(
        "--output", metavar="FOLDER", help="a new folder; default: beside the checkpoint, FOLDER-TO"
    )
    parser.add_argument(
        "--to", choices=READERS, default=READERS[0], help="whom it is for; default %(default)s"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of the weights; default %(default)s"
    )
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="of a file, such as 5GB; default: transformers'"
    )
    parser.add_argument("--dense", action="store_true", help="leave the pruner out")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exports into a folder beside the output, which then takes its name: all or nothing."""
    folder = Path(args.folder or args.model)
    beside = folder if folder.name not in ("", "..") else folder.resolve()
    output = Path(args.output or f"{beside}-{args.to}")
    if args.max_shard_size is not None and SIZE.fullmatch(args.max_shard_size) is None:
        raise ValueError(
            f"--max-shard-size: must be a size such as 500MB or 5GB, got {args.max_shard_size!r}"
        )
    check_folder(folder)
    write_whole(folder, output, args.dtype, args.dense, args.max_shard_size, args.to)
    files = sorted(output.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    print(f"exported {folder} to {output}: {len(files)} file(s), {size / 1e9:.2f} GB, {args.dtype}")
    return 0
