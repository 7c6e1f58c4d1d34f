"""Options of commands that encode images here and have vLLM servers elsewhere answer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itprune.cli import secrets
from itprune.cli.loading import DTYPES, dtype_of, load, one_sentence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from itprune.serving.encoder import Encoder
    from itprune.serving.upstream import UpstreamBackend

KEY = "ITPRUNE_UPSTREAM_KEY"
FILE = "--upstream-key-file"
WIRES = ("prompt", "images")


def add_upstream_options(parser: argparse.ArgumentParser) -> None:
    """The options, in a group of their own."""
    group = parser.add_argument_group("vLLM servers elsewhere")
    group.add_argument(
        "--upstream", metavar="URL,URL", help="where they are, such as http://127.0.0.1:8001"
    )
    group.add_argument(
        "--wire",
        choices=WIRES,
        default=WIRES[0],
        help="prompt: the rows of whole prompts, for stock servers started with "
        "--enable-prompt-embeds; images: chat messages with the rows of images, for servers "
        "started with --enable-mm-embeds; default %(default)s",
    )
    group.add_argument(
        "--same-count",
        type=int,
        metavar="N",
        help="every image keeps N tokens: what --wire images needs where servers run without our "
        "plug-in",
    )
    group.add_argument(
        "--rows-dtype", choices=DTYPES, help="of what is sent; default: that of the checkpoint"
    )
    group.add_argument(
        FILE,
        type=Path,
        metavar="FILE",
        help=f"the key the servers ask for; else {KEY}",
    )


def check_no_upstream(args: argparse.Namespace) -> None:
    """Refuses options that are for servers elsewhere, where there are none.

    Raises:
        ValueError: in one sentence.
    """
    given = {
        "--wire": args.wire != WIRES[0],
        "--same-count": args.same_count is not None,
        "--rows-dtype": args.rows_dtype is not None,
        FILE: args.upstream_key_file is not None,
    }
    for option, there in given.items():
        if there:
            raise ValueError(f"{option}: is for vLLM servers; give --engine vllm and --upstream")


def load_encoder(args: argparse.Namespace) -> Encoder:
    """The vision half of the model the options name.

    Raises:
        ValueError: in one sentence.
    """
    from itprune.serving.encoder import Encoder

    loaded = load(args, llm=False)
    dtype = None if args.rows_dtype is None else dtype_of(args.rows_dtype)
    with one_sentence(Path(args.model)):
        return Encoder(loaded, same_count=args.same_count, dtype=dtype)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What of the options changes answers."""
    return {name: vars(args)[name] for name in ("wire", "same_count", "rows_dtype")}


def make_upstream(
    args: argparse.Namespace,
    name: str,
    offered: Sequence[str] | None = (),
    **more: float,
) -> UpstreamBackend:
    """What answers with the servers of --upstream.

    Args:
        args: the options.
        name: what clients call the model.
        offered: further methods that may be asked for; None: all that fit.
        more: times of `UpstreamBackend`.

    Raises:
        ValueError: in one sentence.
    """
    from itprune.serving.balance import read_urls
    from itprune.serving.upstream import UpstreamBackend
    from itprune.serving.wire import WIRES as KINDS

    urls, key = read_urls(args.upstream or ""), read_key(args.upstream_key_file)
    encoder = load_encoder(args)
    return UpstreamBackend(encoder, KINDS[args.wire](encoder), urls, name, offered, key, **more)


def read_key(file: Path | None) -> str:
    """The key for the servers; empty: none.

    Raises:
        ValueError: in one sentence; there is none, or more than one.
    """
    if file is None:
        return secrets.of_variable(KEY) or ""
    keys = secrets.of_file(FILE, file)
    if len(keys) > 1:
        raise ValueError(f"{FILE} {file}: must hold one key, and nothing else")
    return keys[0]
