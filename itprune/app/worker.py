"""Worker: the line before the model, and the thread that serves it, one question at a time."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from itprune.app.session import Ask, Event, Tell
from itprune.app.streaming import Stopped

logger = logging.getLogger(__name__)

END: Event = {"kind": "end"}
FAILED = "the model failed on this question; the terminal of the server says why"
CLOSING = "the server is stopping; ask again later"


class Full(Exception):
    """The line has no room."""


class Answers(Protocol):
    """What the worker runs: a `Session`."""

    def answer(self, ask: Ask, tell: Tell, stopped: Callable[[], bool]) -> None: ...


@dataclass(eq=False)
class Job:
    """A question in the line."""

    ask: Ask
    tell: Tell
    """Takes the job's events, on the worker's thread or that of whoever joins or leaves; must not
    block. The last one is `END`."""
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when nobody listens any more."""


class Worker:
    """Serves a line of bounded length on a thread of its own.

    Args:
        session: answers one job.
        waiting: how many jobs may wait.
    """

    def __init__(self, session: Answers, waiting: int) -> None:
        self.session, self.waiting = session, waiting
        self._line: deque[Job] = deque()
        self._current: Job | None = None
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="itprune-app", daemon=True)

    def start(self) -> None:
        """Begins to serve."""
        self._thread.start()

    @property
    def full(self) -> bool:
        """Whether `join` would refuse."""
        return self._closed or len(self._line) >= self.waiting

    def join(self, job: Job) -> None:
        """Puts a job at the end of the line; it is told at once how many are ahead.

        Raises:
            Full: there is no room.
        """
        with self._change:
            if self.full:
                raise Full
            self._line.append(job)
            self._tell_places()
            self._change.notify_all()

    def leave(self, job: Job) -> None:
        """Nobody waits for this job: it gives up its place, or its turn on the model."""
        job.gone.set()
        with self._change:
            if job in self._line:
                self._line.remove(job)
                self._tell_places()

    def close(self, wait: bool = True) -> None:
        """Ends the answer in work, tells those who wait, and stops.

        Args:
            wait: until the thread is through; False inside a signal handler.
        """
        with self._change:
            self._closed = True
            left = [*self._line]
            self._line.clear()
            if self._current is not None:
                self._current.gone.set()
            self._change.notify_all()
        for job in left:
            job.tell({"kind": "error", "error": CLOSING})
            job.tell(END)
        if wait and self._thread.is_alive():
            self._thread.join()

    def _tell_places(self) -> None:
        busy = self._current is not None
        for index, job in enumerate(self._line):
            job.tell({"kind": "queue", "ahead": index + busy})

    def _serve(self) -> None:
        while (job := self._next()) is not None:
            self._run(job)
            with self._change:
                self._current = None

    def _next(self) -> Job | None:
        """The job whose turn it is; None: closed."""
        with self._change:
            self._change.wait_for(lambda: self._closed or self._line)
            if self._closed:
                return None
            self._current = self._line.popleft()
            self._tell_places()
            return self._current

    def _run(self, job: Job) -> None:
        try:
            self.session.answer(job.ask, job.tell, job.gone.is_set)
        except Stopped:
            job.tell({"kind": "error", "error": CLOSING})
        except ValueError as error:
            sentence = str(error).partition("\n")[0] or FAILED
            job.tell({"kind": "error", "error": sentence})
        except Exception:  # whatever one question does, the next one is served
            logger.exception("a question failed")
            job.tell({"kind": "error", "error": FAILED})
        job.tell(END)
