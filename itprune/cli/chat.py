"""`itprune chat`: talk with a checkpoint about pictures, turn after turn, on one KV cache.

A line is a question; a line that begins with a slash is a command, and /help lists them. Answers
go to stdout, everything else to stderr. Lines may also come from a file or a pipe.
"""

from __future__ import annotations

import argparse
import io
import sys
from typing import TYPE_CHECKING

from itprune.cli.loading import add_model_options, check_options, load
from itprune.cli.sampling import add_sampling_options, decoding

if TYPE_CHECKING:
    from itprune.cli.chat_session import Session

PROMPT = "> "
EXAMPLES = """\
examples:
  itprune chat --model outputs/run --image a.png
  itprune chat --model outputs/run --keep 0.11 --max-new-tokens 64
  printf '/image a.png\\nWhat digit is red?\\n/stats\\n' | itprune chat --model outputs/run
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "chat",
        help="talk with a checkpoint about pictures",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="shown with the first question; may be given several times",
    )
    add_sampling_options(parser, 256)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Talks until the lines end."""
    session = make_session(args)
    if sys.stdin.isatty():
        session.note(f"[{session.wardrobe}; /help lists the commands, Ctrl-D ends]")
        talk(session)
    else:
        read_on(session)
    return 0


def make_session(args: argparse.Namespace) -> Session:
    """Loads the model; what can be checked without it is checked before.

    Raises:
        ValueError: in one sentence.
    """
    check_options(args)
    draw = decoding(args)
    from itprune.cli.chat_session import Session, Shown
    from itprune.conversation import Conversation
    from itprune.dressing import Wardrobe

    waiting = [Shown.open(name) for name in args.image]
    loaded = load(args)
    session = Session(Conversation(loaded, draw), Wardrobe(loaded), sys.stdout, sys.stderr)
    session.waiting = waiting
    return session


def read_on(session: Session) -> None:
    """Takes the lines of a file or a pipe."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A letter in another encoding is refused with its line, and does not end the chat.
        sys.stdin.reconfigure(errors="surrogateescape")
    for line in sys.stdin:
        try:
            if not session.take(line.rstrip("\r\n")):
                return
        except ValueError as error:
            session.note(str(error))


def talk(session: Session) -> None:
    """Takes lines that are typed, with their history in memory; Ctrl-C twice ends it."""
    import readline  # noqa: F401  (`input` edits lines with it)

    stopped = 0
    while True:
        try:
            line = input(PROMPT)
            stopped = 0
            if not session.take(line):
                return
        except EOFError:
            session.note("")
            return
        except KeyboardInterrupt as error:
            stopped += _times(error)
            if stopped > 1:
                session.note("")
                return
            session.note("\n[Ctrl-C again, or Ctrl-D, ends the chat]")
        except ValueError as error:
            session.note(str(error))


def _times(error: BaseException | None) -> int:
    """How often Ctrl-C was pressed: again, while the first was still ending an answer."""
    if error is None:
        return 0
    return isinstance(error, KeyboardInterrupt) + _times(error.__context__)
