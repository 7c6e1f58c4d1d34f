"""`itprune encode`: images of a file of questions, encoded here for a language model elsewhere.

Vision tower, stage 1 and projector run; the language model is not read. With --folder the rows that
stay are written, one safetensors file a line, and beside them requests.jsonl: the exact requests
for a vLLM server, in the layout of OpenAI's batch files. With --upstream they are sent to vLLM
servers, which answer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from itprune.cli.infer import add_file_options, check_file_options
from itprune.cli.loading import add_model_options, check_least
from itprune.cli.sampling import decoding
from itprune.cli.upstream import add_upstream_options, load_encoder, make_upstream, settings

EXAMPLES = """\
examples:
  itprune encode --model outputs/run --jsonl in.jsonl --folder build/rows
  itprune encode --model outputs/run --jsonl in.jsonl --output out.jsonl \\
    --upstream http://127.0.0.1:8001,http://127.0.0.1:8002
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "encode",
        help="encode images here for a language model elsewhere (vLLM)",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    add_file_options(parser)
    parser.add_argument(
        "--folder", metavar="FOLDER", help="a new folder for rows and requests; nothing is sent"
    )
    parser.add_argument(
        "--served-name",
        metavar="NAME",
        help="what the server of requests.jsonl calls its model; default: the folder's name",
    )
    parser.add_argument(
        "--concurrency", type=int, default=32, metavar="N", help="lines under way; default 32"
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="of a line, up to half of them spent on waiting for a server; default 600",
    )
    add_upstream_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes requests, or answers."""
    if args.jsonl is None:
        raise ValueError("name the questions with --jsonl")
    if (args.folder is None) == (args.upstream is None):
        raise ValueError("give either --folder (to write rows) or --upstream (to have answers)")
    check_file_options(args)
    check_least(args, concurrency=1)
    if not args.max_seconds > 0:
        raise ValueError(f"--max-seconds: must be above 0, got {args.max_seconds}")
    if args.folder is None:
        return _answer(args)
    if args.output is not None:
        raise ValueError("--output is for the answers of --upstream; rows go to --folder")
    return _write(args)


def _write(args: argparse.Namespace) -> int:
    from itprune.cli.encoded_folder import EncodedFolder
    from itprune.cli.infer import progress
    from itprune.cli.new_folder import new_folder
    from itprune.cli.question_lines import QuestionLines
    from itprune.serving.wire import WIRES, Draw

    draw = decoding(args)
    source = QuestionLines.from_options(args, draw)
    with new_folder(Path(args.folder)) as folder:
        encoder = load_encoder(args)
        name = args.served_name or Path(args.model).resolve().name
        how = Draw.of(encoder.answerer, draw)
        output = EncodedFolder(folder, WIRES[args.wire](encoder), how, name)
        with progress(source.count(), 0, args.quiet) as bar, output:
            output.fill(encoder, source, args.batch_size, bar)
    return output.tell(Path(args.folder))


def _answer(args: argparse.Namespace) -> int:
    import asyncio

    from itprune.cli.answer_file import AnswerFile
    from itprune.cli.asked_lines import AskedLines
    from itprune.cli.infer import progress
    from itprune.cli.question_lines import QuestionLines

    draw = decoding(args)
    source = QuestionLines.from_options(args, draw, settings(args))
    with AnswerFile.open(args.output, source.path, args.retry) as output:
        left = list(output.left_over(source))
        if left:
            wait = args.max_seconds / 2  # the other half is for the answer
            backend = make_upstream(
                args, Path(args.model).resolve().name, patience=wait, busy_patience=wait
            )
            with progress(source.count(), len(output.done), args.quiet) as bar:
                asked = AskedLines(backend, source, draw, output.write, bar, args.max_seconds)
                asyncio.run(asked(left, args.concurrency))
        return output.tell()
