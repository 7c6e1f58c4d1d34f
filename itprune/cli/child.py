"""A program that runs for a command: its output streams, our signals reach it, its status is ours.

A launcher has processes of its own to look after, so a signal goes to the launcher alone, which
ends them in order; the whole family at once would take the data workers from under a run that is
about to save. DeepSpeed's command is a thin shell around its launcher and dies without passing a
signal on, so there the launcher inside is told.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_child(command: Sequence[str], shell_around: bool = False) -> int:
    """Runs a program until it ends.

    Args:
        command: its words.
        shell_around: the process that looks after the others is the first child of this one.

    Returns:
        Its exit status; 128 + N where signal N ended it, as shells have it.

    Raises:
        ValueError: it cannot be started.
    """
    try:
        # A session of its own: Ctrl-C in a terminal reaches us alone, and once.
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        raise ValueError(f"{command[0]}: cannot be started ({error.strerror})") from None
    with _passing_on(child, shell_around):
        status = child.wait()
    return status if status >= 0 else 128 - status


@contextmanager
def _passing_on(child: subprocess.Popen[bytes], shell_around: bool) -> Iterator[None]:
    """Hands signals on while the child runs: the first as it is, a second one ends everything."""
    seen = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) > 1:
            _kill_all(child.pid)
            return
        name = signal.Signals(number).name
        print(f"itprune: {name} passed on; once more ends it at once", file=sys.stderr)
        _send(child, number, shell_around)

    before = {number: signal.signal(number, hand_on) for number in PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(child: subprocess.Popen[bytes], number: int, shell_around: bool) -> None:
    import psutil  # comes with accelerate, without which nothing trains

    inner = []
    if shell_around:
        try:
            inner = psutil.Process(child.pid).children()
        except psutil.NoSuchProcess:
            return
    if inner:
        inner[0].send_signal(number)
    else:
        child.send_signal(number)


def _kill_all(pid: int) -> None:
    """Kills a process with all that came of it."""
    import psutil

    try:
        first = psutil.Process(pid)
        family = [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
