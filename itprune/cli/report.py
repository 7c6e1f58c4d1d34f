"""`itprune report`: runs side by side on one page: figures, curves, and what differs between them.

A RUN is the output folder of a training (finished, stopped or under way), of `itprune eval` or of
`itprune compare`. The page is one file that asks for nothing outside: it can be sent and kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from itprune.writing import replace_text

ENDINGS = (".html", ".htm")
EXAMPLES = """\
examples:
  itprune report outputs/pruned outputs/dense --output report.html
  itprune report outputs/* eval --json
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "report",
        help="compare runs on one page",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="an output folder")
    parser.add_argument("--output", metavar="FILE", help="the page to write, such as report.html")
    parser.add_argument("--title", default="Runs compared", help="of the page")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the page, prints the figures, or both.

    Raises:
        ValueError: a folder is no run or damaged, or the page cannot be written.
    """
    if args.output is None and not args.json:
        raise ValueError("give --output FILE.html for the page, --json for the figures, or both")
    output = Path(args.output) if args.output is not None else None
    if output is not None and output.suffix.lower() not in ENDINGS:
        raise ValueError(f"--output {output}: the page is HTML, so its name must end in .html")
    from itprune.reporting.summary import summarise

    summary = summarise([Path(name) for name in args.runs])
    if output is not None:
        from itprune.reporting.render import render

        _write(output, render(summary, args.title))
    if args.json:
        print(json.dumps(summary.to_dict(), indent=1))
    else:
        print(f"{output}: {len(summary.runs)} run(s), {len(summary.scores)} folder(s) of scores")
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise ValueError(f"--output {path}: cannot be written ({error.strerror})") from None
