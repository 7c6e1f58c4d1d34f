"""`itprune app`: a local web page that asks a checkpoint about pictures and shows what it keeps.

The page is served on this machine only, unless --allow-remote lets others in. It loads nothing from
elsewhere and sends nothing there; pictures and questions stay in memory.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from itprune.cli.loading import add_model_options, check_options, load
from itprune.web.listening import address, check_host, open_socket

if TYPE_CHECKING:
    from itprune.app.limits import Limits

EXAMPLES = """\
examples:
  itprune app --model outputs/run
  itprune app --model outputs/run --port 8000 --keep 0.3 --method visionzip
  itprune app --model outputs/run --host 0.0.0.0 --allow-remote     (others may use it, too)
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "app",
        help="a local web page that asks a checkpoint",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address; default 127.0.0.1")
    parser.add_argument(
        "--port", type=int, default=7860, metavar="N", help="default 7860; 0: any free one"
    )
    parser.add_argument(
        "--allow-remote", action="store_true", help="allow a --host that others can reach"
    )
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name of this server: that of a proxy before it",
    )
    parser.add_argument(
        "--max-mb", type=float, default=10.0, metavar="MB", help="largest upload; default 10"
    )
    parser.add_argument(
        "--max-pixels", type=int, default=16_000_000, metavar="N", help="default 16000000"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="longest answer; default 512"
    )
    parser.add_argument(
        "--max-seconds", type=float, default=120.0, metavar="S", help="longest time; default 120"
    )
    parser.add_argument(
        "--max-waiting", type=int, default=32, metavar="N", help="questions in the line; default 32"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until Ctrl-C; 0 then."""
    _check_host(args)
    check_options(args)
    limits = _limits(args)
    try:
        from itprune.app.serving import serve
    except ImportError as error:
        raise ValueError(
            f"the page needs a package that is not installed ({error.name}): "
            "pip install 'itprune[app]'"
        ) from None
    with open_socket(args.host, args.port) as listener:
        from itprune.app.session import Session

        session = Session(load(args), Path(args.model).resolve().name, limits)
        print(f"itprune app: {address(listener)} (Ctrl-C ends it)", flush=True)
        serve(session, listener, args.host, args.name)
    print("itprune app: ended", file=sys.stderr)
    return 0


def _limits(args: argparse.Namespace) -> Limits:
    from itprune.app.limits import Limits

    options = {
        "--max-mb": args.max_mb,
        "--max-pixels": args.max_pixels,
        "--max-new-tokens": args.max_new_tokens,
        "--max-seconds": args.max_seconds,
        "--max-waiting": args.max_waiting,
    }
    for option, value in options.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{option}: must be above 0, got {value}")
    return Limits(
        body_mb=args.max_mb,
        pixels=args.max_pixels,
        answer=args.max_new_tokens,
        seconds=args.max_seconds,
        waiting=args.max_waiting,
    )


def _check_host(args: argparse.Namespace) -> None:
    """Refuses to serve others unless that is meant.

    Raises:
        ValueError: in one sentence.
    """
    if check_host(args.host, args.port, args.allow_remote, "this page"):
        warnings.warn(
            f"everybody who reaches {args.host} may use this page; there is no password and no "
            "encryption",
            stacklevel=1,
        )
