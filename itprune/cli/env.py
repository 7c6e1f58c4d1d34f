"""`itprune env`: versions, devices, and what is missing for which feature.

Reads what pip knows of the packages, asks no network, and names packages that are installed but do
not go together.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from itprune.environment import Environment

GB = 1 << 30
EXAMPLES = """\
examples:
  itprune env
  itprune env --json > environment.json        (for a bug report)
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "env",
        help="versions, devices, and what is missing for which feature",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints what there is."""
    from itprune.environment import look

    found = look()
    if args.json:
        print(json.dumps(found.to_dict(), indent=1, ensure_ascii=False))
    else:
        print("\n".join(describe(found)))
    return 0


def describe(found: Environment) -> Iterator[str]:
    """The findings, for people."""
    yield f"system    {found.system}, Python {found.python}"
    yield f"machine   {found.cores} CPU cores, {found.memory / GB:.0f} GB of memory"
    build = f"built for CUDA {found.cuda}" if found.cuda else "a CPU build"
    if not found.devices:
        yield f"devices   no accelerator; torch is {build}"
    for index, device in enumerate(found.devices):
        facts = [f"{device.memory / GB:.0f} GB"] if device.memory else []
        facts += [f"capability {device.capability}"] if device.capability else []
        facts += ["bf16"] if device.bf16 else ["no bf16"] if device.capability else []
        yield f"{'devices' if index == 0 else '':10}{', '.join([device.name, *facts])}; {build}"
    tools = (f"{name} {path or '–'}" for name, path in found.tools.items())
    yield f"tools     {', '.join(tools)}"
    yield ""
    yield from _table([(n, v or "–") for n, v in found.packages.items()])
    yield ""
    rows = [("feature", "state", "install")]
    for state in found.features:
        said = "ready" if state.ready else f"missing: {', '.join(state.missing)}"
        rows.append((state.feature, said, state.command or ""))
    yield from _table(rows)
    if found.traps:
        yield ""
    yield from (f"trap: {sentence}" for sentence in found.traps)


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()
