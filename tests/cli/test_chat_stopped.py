"""`itprune chat` stopped by Ctrl-C and Ctrl-D, and on a real terminal."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from itprune.cli import chat
from itprune.cli.chat_session import Session
from tests.cli.test_chat import make_session, told


@pytest.fixture
def session(checkpoint: Path) -> Session:
    return make_session(checkpoint)


def typed(monkeypatch: Any, *lines: str | type[BaseException]) -> None:
    """What `input` gives; a class is raised."""
    left: Iterator[str | type[BaseException]] = iter(lines)

    def give(prompt: str) -> str:
        line = next(left)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr("builtins.input", give)


class Impatient(io.StringIO):
    """Ctrl-C is pressed at the first letter."""

    def write(self, text: str) -> int:
        if text.strip():
            raise KeyboardInterrupt
        return super().write(text)


def test_ctrl_c_ends_an_answer_and_the_dialogue_goes_on(session: Session, monkeypatch: Any) -> None:
    out, session.out = session.out, Impatient()

    def calm(line: str) -> bool:
        session.out = out
        return take(line)

    take = session.take
    typed(monkeypatch, "green blue", "yellow", EOFError)
    monkeypatch.setattr(session, "take", lambda line: (take if line != "yellow" else calm)(line))
    chat.talk(session)
    assert "[Ctrl-C again, or Ctrl-D, ends the chat]" in told(session)
    assert len(session.conversation.messages) == 4
    assert session.conversation.turn.tokens_cached > 0
    assert out.getvalue().strip()


def test_ctrl_c_twice_ends_the_chat(session: Session, monkeypatch: Any) -> None:
    typed(monkeypatch, KeyboardInterrupt, "/help", KeyboardInterrupt, KeyboardInterrupt, "/stats")
    chat.talk(session)
    assert "/image FILE" in told(session)
    assert "nothing was asked" not in told(session)


def test_ctrl_c_while_an_answer_ends_counts(session: Session, monkeypatch: Any) -> None:
    def impatient(line: str) -> bool:
        try:
            raise KeyboardInterrupt
        finally:
            raise KeyboardInterrupt  # while the first waits for the model

    typed(monkeypatch, "green", "/help")
    monkeypatch.setattr(session, "take", impatient)
    chat.talk(session)
    assert told(session) == "\n"


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *command: str) -> None:
        self.screen, side = pty.openpty()
        self.left = b""
        environment = {**os.environ, "TERM": "dumb", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.program = subprocess.Popen(
            command,
            stdin=side,
            stdout=side,
            stderr=side,
            env=environment,
            start_new_session=True,
        )
        os.close(side)

    def wait(self) -> None:
        """Until something is shown that was not read yet."""
        if not self.left:
            ready, _, _ = select.select([self.screen], [], [], 120)
            assert ready, "nothing is shown any more"
            self.left = os.read(self.screen, 4096)

    def read_until(self, text: str) -> str:
        """What is shown up to and with `text`."""
        shown = b""
        while text.encode() not in shown:
            self.wait()
            shown, self.left = shown + self.left, b""
        head, found, self.left = shown.partition(text.encode())
        return (head + found).decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())


def test_on_a_terminal(checkpoint: Path, pictures: Path) -> None:
    """Typed lines, Ctrl-C in the middle of a long answer, and Ctrl-D."""
    arguments = ["chat", "--model", str(checkpoint), "--max-new-tokens", "400", "--device", "cpu"]
    terminal = Terminal(sys.executable, "-m", "itprune.cli", *arguments)
    try:
        assert "/help lists the commands" in terminal.read_until("> ")
        terminal.type(f"/image {pictures / '0.png'}\n")
        terminal.read_until("1 picture(s) with the next question]\r\n> ")
        terminal.type("What colour is the square?\n")
        terminal.read_until("square?\r\n")
        terminal.wait()  # the answer has begun
        terminal.program.send_signal(signal.SIGINT)
        terminal.read_until("[Ctrl-C again, or Ctrl-D, ends the chat]\r\n> ")
        terminal.type("/stats\n")
        assert "visual tokens 16 -> " in terminal.read_until("tokens after")
        terminal.read_until("> ")
        terminal.type("\x04")
        assert terminal.program.wait(timeout=60) == 0
    finally:
        terminal.program.kill()
        os.close(terminal.screen)
