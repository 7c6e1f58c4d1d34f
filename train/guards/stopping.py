"""Being asked to stop: SIGTERM or SIGUSR1, as a scheduler sends them before it takes a node away.

A thread waits for the signals, so they are heard while the main thread is inside a collective. They
stay blocked in every other thread and, inherited, in the data workers: a scheduler signals all
processes of a job, and a step needs its workers to end.

Ctrl-C ends a run at once, as ever, but is remembered: where it meets a destructor, Python drops it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time


class StopRequest:
    """Whether somebody asked this process to stop.

    Attributes:
        signal: the signal's number; None: nobody did.
        at: when, in seconds of `time.monotonic`.
        saves: whether a checkpoint can be written first; if not, the process ends at once.
        interrupted: whether Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.at = 0.0
        self.saves = False
        self.interrupted = False

    def listen(self) -> None:
        """Starts the thread; to be called before anything starts threads of its own."""
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)
        if sys.platform == "win32":
            return
        wanted = (signal.SIGTERM, signal.SIGUSR1)
        signal.pthread_sigmask(signal.SIG_BLOCK, wanted)

        def wait() -> None:
            while True:
                self.receive(signal.sigwait(wanted))

        threading.Thread(target=wait, name="stop requests", daemon=True).start()

    def _interrupt(self, *call: object) -> None:
        self.interrupted = True
        raise KeyboardInterrupt

    def receive(self, number: int) -> None:
        """Takes note of a signal, or ends the process where there is nothing to save yet."""
        if not self.saves:
            if os.environ.get("RANK", "0") == "0":
                name = signal.Signals(number).name
                print(f"stopped by {name}: no training was under way", file=sys.stderr, flush=True)
            os._exit(128 + number)
        if self.signal is None:
            self.signal, self.at = number, time.monotonic()
