"""`itprune infer`: ask a checkpoint about pictures, one question or a file of them."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from typing import TYPE_CHECKING, Any

from itprune.cli.loading import add_model_options, check_least, check_options, load
from itprune.cli.sampling import add_sampling_options, decoding
from itprune.cli.terminal import harmless

if TYPE_CHECKING:
    from tqdm import tqdm

    from itprune.answer import Answer, Answerer

EXAMPLES = """\
examples:
  itprune infer --model outputs/run --image a.png --prompt "What digit is red?"
  itprune infer --model outputs/run --image a.png --image b.png --prompt "What differs?" --json
  itprune infer --model outputs/run --jsonl in.jsonl --output out.jsonl --batch-size 8
  itprune infer --model outputs/run --image a.png --prompt "…" --keep 1.0     (dense control)
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "infer",
        help="ask a checkpoint about pictures",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="may be given several times"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="the question; -: read it from stdin")
    add_file_options(parser)
    parser.add_argument("--json", action="store_true", help="print answer and figures as JSON")
    parser.set_defaults(run=run)


def add_file_options(parser: argparse.ArgumentParser) -> None:
    """The options of a file of questions, and of decoding."""
    parser.add_argument("--jsonl", metavar="FILE", help="one question a line; -: stdin")
    parser.add_argument(
        "--output", metavar="FILE", help="answers to --jsonl, in its order; default -: stdout"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument(
        "--image-root",
        metavar="FOLDER",
        help="images of --jsonl are looked for, and only opened, here; default: its own folder",
    )
    add_sampling_options(parser, 128)
    parser.add_argument(
        "--retry", action="store_true", help="ask the lines again that failed in an earlier run"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Answers one prompt or a file."""
    if (args.prompt is None) == (args.jsonl is None):
        raise ValueError("give either --prompt (with any --image) or --jsonl")
    if args.prompt is not None:
        if args.output is not None:
            raise ValueError("--output belongs to --jsonl; a single answer goes to stdout")
        return _run_one(args)
    if args.image:
        raise ValueError("--image belongs to --prompt; a JSONL line names its own images")
    return _run_file(args)


def load_answerer(args: argparse.Namespace) -> Answerer:
    """Loads the model; what can be checked without it is checked before.

    Raises:
        ValueError: in one sentence.
    """
    from itprune.answer import Answerer

    draw = decoding(args)
    return Answerer(load(args), draw)


# -------------------------------------------------------------------------------- one question
def _run_one(args: argparse.Namespace) -> int:
    from itprune.question import Question, open_image

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    question = Question.from_prompt(prompt, [open_image(path) for path in args.image])
    answer = load_answerer(args)([question])[0]
    if args.json:
        print(json.dumps(answer.to_dict(), ensure_ascii=False))
        return 0
    print(harmless(answer.answer) if sys.stdout.isatty() else answer.answer)
    print(describe(answer), file=sys.stderr)
    return 0


def describe(answer: Answer) -> str:
    """The figures, for people."""
    visual = ""
    if answer.visual_layer_average is not None:
        visual = (
            f"visual tokens {answer.visual_in} -> {answer.visual_stage1} -> {answer.visual_stage2} "
            f"(layer average {answer.visual_layer_average:.1%}); "
        )
    return (
        f"{visual}all tokens {answer.tokens_in} -> {answer.tokens_stage1} -> "
        f"{answer.tokens_stage2}; KV cache {answer.kv_entries} entries, "
        f"{answer.kv_bytes / 1024:.0f} KiB; first token after {answer.first_token_s:.3f} s, "
        f"{answer.tokens_out} tokens after {answer.total_s:.3f} s"
    )


# ------------------------------------------------------------------------------------- a file
def _run_file(args: argparse.Namespace) -> int:
    from itprune.cli.answer_file import AnswerFile
    from itprune.cli.answer_lines import answer_lines
    from itprune.cli.question_lines import QuestionLines

    check_file_options(args)
    source = QuestionLines.from_options(args, decoding(args))
    with AnswerFile.open(args.output, source.path, args.retry) as output:
        left = output.left_over(source)
        first = next(left, None)
        if first is not None:
            answerer = load_answerer(args)
            with progress(source.count(), len(output.done), args.quiet) as bar:
                lines = itertools.chain([first], left)
                answer_lines(answerer, lines, source, output.write, args.batch_size, bar)
        return output.tell()


def check_file_options(args: argparse.Namespace) -> None:
    """Refuses what cannot work before any file is opened.

    Raises:
        ValueError: in one sentence.
    """
    check_least(args, batch_size=1)
    check_options(args)


def progress(total: int | None, done: int, quiet: bool) -> tqdm[Any]:
    """A bar of lines on stderr."""
    from tqdm import tqdm

    return tqdm(total=total, initial=done, disable=quiet, unit="line", file=sys.stderr)
