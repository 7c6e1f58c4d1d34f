"""Stand-ins for the model and for visitors, which do what a test says when it says so."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Queue

from itprune.app.session import Ask, Event, Tell
from itprune.app.streaming import Stopped
from itprune.app.worker import END, Job
from tests.app.serving import WAIT


class Slow:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.began: Queue[str] = Queue()
        self.go = threading.Semaphore(0)

    def answer(self, ask: Ask, tell: Tell, stopped: Callable[[], bool]) -> None:
        self.began.put(ask.prompt)
        while not self.go.acquire(timeout=0.01):
            if stopped():
                raise Stopped
        if ask.prompt == "bad":
            raise ValueError("a sentence\nand a second line")
        if ask.prompt == "mute":
            raise ValueError
        if ask.prompt == "broken":
            raise RuntimeError("/secret/path")
        tell({"kind": "done", "answer": ask.prompt})


class Visitor:
    """Listens to one job."""

    def __init__(self, prompt: str) -> None:
        self.events: Queue[Event] = Queue()
        self.job = Job(Ask(b"", prompt, "itprune", 0.3, 8, False), self.events.put)

    def told(self) -> list[Event]:
        """Everything up to the end."""
        out = []
        while (event := self.events.get(timeout=WAIT)) != END:
            out.append(event)
        return out
