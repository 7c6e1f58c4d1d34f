"""`itprune serve`: an endpoint that OpenAI's clients can ask, on a checkpoint.

Requests that come together are answered together. This machine only may ask, unless --allow-remote
lets others in; nothing is fetched, nothing is written, and no request is logged.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from itprune.cli import secrets
from itprune.cli.loading import add_loading_options, check_options, load
from itprune.cli.upstream import add_upstream_options, check_no_upstream, make_upstream
from itprune.web.listening import address, check_host, open_socket

if TYPE_CHECKING:
    from itprune.checkpoint import Loaded
    from itprune.serving.backend import Backend
    from itprune.serving.limits import Limits

EXAMPLES = """\
examples:
  itprune serve outputs/run
  itprune serve outputs/run --methods itprune,visionzip --keep-min 0.1 --keep-max 0.5
  itprune serve outputs/run --engine vllm --upstream http://10.0.0.1:8000,http://10.0.0.2:8000
  itprune serve outputs/run --host 0.0.0.0 --allow-remote --api-key-file keys.txt
"""
KEY = "ITPRUNE_API_KEY"
ENGINES = ("own", "vllm")
LIMITS = (
    ("--max-mb", "body_mb", "MB", float, "largest request"),
    ("--max-pixels", "pixels", "N", int, "pixels of all pictures of a request"),
    ("--max-images", "images", "N", int, "pictures of one request"),
    ("--max-text", "text", "N", int, "letters of one request"),
    ("--max-new-tokens", "answer", "N", int, "longest answer, and that of who names no length"),
    ("--max-seconds", "seconds", "S", float, "longest time of a request; its answer is then cut"),
    ("--max-requests", "requests", "N", int, "requests under way, those that wait included"),
    ("--rate", "rate", "N", int, "requests of one key, or else one address, in a minute"),
    ("--drain-seconds", "drain_seconds", "S", float, "to finish answers in when told to end"),
    ("--keep-min", "keep_min", "FRACTION", float, "least keep a request may ask for"),
    ("--keep-max", "keep_max", "FRACTION", float, "largest keep a request may ask for"),
)  # fmt: skip
"""Option, field of `Limits`, and what help says of it; defaults are those of the fields."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "serve",
        help="an endpoint that OpenAI's clients can ask",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="CHECKPOINT", help="a checkpoint, or an ordinary model folder"
    )
    add_loading_options(parser)
    parser.add_argument(
        "--served-name", metavar="NAME", help="what clients call the model; default: its folder's"
    )
    parser.add_argument(
        "--methods",
        default="",
        metavar="A,B",
        help="further methods a request may ask for; all: those that fit; default: --method only",
    )
    _add_listening(parser)
    limits = parser.add_argument_group("limits")
    for option, field, metavar, kind, meaning in LIMITS:
        limits.add_argument(option, dest=field, type=kind, metavar=metavar, help=meaning)
    limits.add_argument(
        "--max-rows", type=int, default=64, metavar="N", help="answers made at once; default 64"
    )
    limits.add_argument(
        "--max-kv-mb",
        type=float,
        metavar="MB",
        help="their keys and values; default: half of what is free",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="own",
        help="what makes answers: the model in this process, or vLLM servers that get what stays "
        "of prompts encoded here; default %(default)s",
    )
    add_upstream_options(parser)
    parser.set_defaults(run=run)


def _add_listening(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("who may ask, and for what")
    group.add_argument("--host", default="127.0.0.1", help="address; default 127.0.0.1")
    group.add_argument(
        "--port", type=int, default=8000, metavar="N", help="default 8000; 0: any free one"
    )
    group.add_argument(
        "--allow-remote", action="store_true", help="allow a --host that others can reach"
    )
    group.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name of this server: that of a proxy before it",
    )
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"keys, one a line, any of which a request must bring; {KEY} is one more",
    )
    group.add_argument(
        "--allow-files",
        type=Path,
        metavar="FOLDER",
        help="pictures inside it may be named instead of sent; default: none",
    )


def run(args: argparse.Namespace) -> int:
    """Serves until Ctrl-C or SIGTERM; 0 then."""
    open_to_others = check_host(args.host, args.port, args.allow_remote, "this endpoint")
    check_options(args)
    if args.allow_files is not None and not args.allow_files.is_dir():
        raise ValueError(f"--allow-files {args.allow_files}: no such folder")
    try:
        from itprune.serving.images import Pictures
        from itprune.serving.keys import Keys, check_keys
        from itprune.serving.launching import serve
        from itprune.serving.server import Endpoint
    except ImportError as error:
        raise ValueError(
            f"the endpoint needs a package that is not installed ({error.name}): "
            "pip install 'itprune[serve]'"
        ) from None
    limits = make_limits(args)
    keys = read_keys(args.api_key_file)
    check_keys(keys)
    if open_to_others:
        _warn(args.host, bool(keys))
    with open_socket(args.host, args.port) as listener:
        backend = make_backend(args, limits)
        endpoint = Endpoint(backend, limits, Keys(keys), Pictures(limits, args.allow_files))
        facts = backend.facts()
        print(
            f"itprune serve: {address(listener)}/v1 ({facts.name}, {facts.method} at keep "
            f"{facts.keep:g}; Ctrl-C ends it)",
            flush=True,
        )
        with warnings.catch_warnings():
            # What is said of a pruner was said when it was loaded; requests would have it repeated.
            warnings.simplefilter("ignore")
            serve(endpoint, listener, args.host, args.name)
    print("itprune serve: ended", file=sys.stderr)
    return 0


def read_keys(file: Path | None) -> tuple[str, ...]:
    """The keys that open this server; none: everybody may ask.

    Raises:
        ValueError: in one sentence.
    """
    single = secrets.of_variable(KEY)
    keys = () if single is None else (single,)
    return keys if file is None else keys + secrets.of_file("--api-key-file", file)


def make_limits(args: argparse.Namespace) -> Limits:
    """The limits of the options.

    Raises:
        ValueError: one that lets nothing through.
    """
    from itprune.serving.limits import Limits

    given = {}
    for option, field, *_ in LIMITS:
        value = vars(args)[field]
        if value is None:
            continue
        if not 0 < value < float("inf"):
            raise ValueError(f"{option}: must be above 0, got {value}")
        given[field] = value
    try:
        return Limits(**given)
    except ValueError as error:
        raise ValueError(str(error).replace("keep_m", "--keep-m")) from None


def make_backend(args: argparse.Namespace, limits: Limits) -> Backend:
    """What answers."""
    if (args.engine == "vllm") != (args.upstream is not None):
        raise ValueError("--engine vllm and --upstream belong together: give both or none")
    if args.engine == "vllm":
        backend = make_upstream(args, served_name(args), offered_methods(args.methods))
        limits.check_keep(backend.facts().keep)
        return backend
    check_no_upstream(args)
    from itprune.serving.admission import MB, Admission, prompt_room, spare_bytes
    from itprune.serving.local import LocalBackend

    if args.max_rows < 1:
        raise ValueError(f"--max-rows: must be at least 1, got {args.max_rows}")
    loaded = load(args)
    method, keep = start_of(loaded, limits)
    if args.max_kv_mb is not None and not 0 < args.max_kv_mb < float("inf"):
        raise ValueError(f"--max-kv-mb: must be above 0, got {args.max_kv_mb}")
    device = next(loaded.model.parameters()).device
    room = spare_bytes(device) if args.max_kv_mb is None else int(args.max_kv_mb * MB)
    return LocalBackend(
        loaded,
        served_name(args),
        method,
        keep,
        offered_methods(args.methods),
        Admission(room, args.max_rows, prompt_room(device)),
    )


def served_name(args: argparse.Namespace) -> str:
    """What clients call the model."""
    return args.served_name or Path(args.model).resolve().name


def offered_methods(text: str) -> tuple[str, ...] | None:
    """The names of --methods; None: all.

    Raises:
        ValueError: one that nobody knows.
    """
    from itprune.cli.loading import check_choices

    if text.strip() == "all":
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        check_choices(name, None)
    return names


def start_of(loaded: Loaded, limits: Limits) -> tuple[str, float]:
    """Method and keep of a request that names none: the checkpoint's, or those of the options.

    Raises:
        ValueError: the keep is not one that requests may ask for.
    """
    from itprune.config import PruneConfig

    config = PruneConfig() if loaded.attached is None else loaded.attached.config
    keep = config.final_keep or PruneConfig().final_keep or 1.0
    limits.check_keep(keep)
    return config.method, keep


def _warn(host: str, keys: bool) -> None:
    who = "who has a key" if keys else "everybody who reaches it"
    password = "" if keys else "no password (--api-key-file) and "
    warnings.warn(
        f"{host} can be reached by others, and {who} may use this endpoint; there is {password}no "
        "encryption",
        stacklevel=1,
    )
