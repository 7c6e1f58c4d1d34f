"""What `itprune chat` does with each line: a command behind a slash, or the next question."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from itprune.answer import TooLong
from itprune.cli.terminal import say
from itprune.conversation import Conversation, Turn
from itprune.dressing import Wardrobe
from itprune.options import nearest
from itprune.question import open_image

HELP = """\
/image FILE   show a picture with the next question; several may be given; no FILE: none after all
/keep 0.3     keep this fraction of the visual tokens from now on
/method NAME  choose them by another method (see `itprune methods`)
/dense        keep all of them, until /keep or /method
/reset        begin a new dialogue
/stats        what the last answer cost
/save FILE    write the dialogue as one line that `itprune infer --jsonl` reads
/help         this list
/quit         end, as Ctrl-D does; Ctrl-C ends an answer, twice it ends the chat
A question that begins with a slash: put a space before it."""


@dataclass(frozen=True)
class Shown:
    """A picture and the file it came from."""

    path: Path
    image: Image.Image

    @classmethod
    def open(cls, name: str) -> Shown:
        """Reads a file.

        Raises:
            ValueError: missing or no picture, in one sentence.
        """
        path = named(name)
        return cls(path, open_image(path))


def named(name: str) -> Path:
    """The file of a name as people write it; `~` of nobody's is a letter."""
    return Path(os.path.abspath(os.path.expanduser(name)))


class Session:
    """One chat.

    Args:
        conversation: with the model.
        wardrobe: of the same loaded model.
        out: answers go here.
        err: everything else.
    """

    def __init__(
        self, conversation: Conversation, wardrobe: Wardrobe, out: TextIO, err: TextIO
    ) -> None:
        self.conversation, self.wardrobe = conversation, wardrobe
        self.out, self.err = out, err
        self.waiting: list[Shown] = []
        """Pictures for the next question."""
        self.shown: list[Shown] = []
        """Those of the dialogue."""
        self._commands: dict[str, Callable[[str], None]] = {
            "image": self._image,
            "keep": self._keep,
            "method": self._method,
            "dense": self._dense,
            "reset": self._reset,
            "stats": self._stats,
            "save": self._save,
            "help": lambda rest: self.note(HELP),
        }

    def note(self, text: str) -> None:
        """Something that is no answer."""
        say(text, self.err)

    def take(self, line: str) -> bool:
        """Does what a line says; False: the chat is over.

        Raises:
            ValueError: in one sentence; the chat can go on.
        """
        if not line.startswith("/"):
            if line.strip():
                self._ask(line.strip())
            return True
        name, _, rest = line[1:].strip().partition(" ")
        if name == "quit":
            return False
        if name not in self._commands:
            valid = nearest(name, [*self._commands, "quit"])
            raise ValueError(f"unknown command /{name}; {valid} (/help explains them)")
        self._commands[name](rest.strip())
        return True

    # ------------------------------------------------------------------------------------ asking
    def _ask(self, text: str) -> None:
        turns = len(self.conversation.messages)
        try:
            pieces = self.conversation.ask(text, [shown.image for shown in self.waiting])
        except TooLong as error:
            raise ValueError(f"{error}; /reset begins a new dialogue") from None
        try:
            with closing(pieces):
                for piece in pieces:
                    say(piece, self.out, end="")
        finally:
            if len(self.conversation.messages) > turns:  # not where the model refused the turn
                self.shown += self.waiting
                self.waiting = []
                say("", self.out)
        turn = self.conversation.turn
        if turn is not None and turn.recomputed:
            self.note(f"[the whole dialogue was run again: {turn.recomputed}]")

    # ---------------------------------------------------------------------------------- commands
    def _image(self, name: str) -> None:
        if not name:
            self.waiting = []
            self.note("[no picture with the next question]")
            return
        if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"":
            name = name[1:-1]
        self.waiting.append(Shown.open(name))
        self.note(f"[{len(self.waiting)} picture(s) with the next question]")

    def _keep(self, value: str) -> None:
        try:
            keep = float(value)
        except ValueError:
            raise ValueError(f"/keep: a fraction in (0, 1] is needed, got {value!r}") from None
        self._wear(lambda: self.wardrobe.keep(keep))

    def _method(self, name: str) -> None:
        self._wear(lambda: self.wardrobe.method(name))

    def _dense(self, rest: str) -> None:
        self._wear(self.wardrobe.dense)

    def _wear(self, change: Callable[[], None]) -> None:
        before = str(self.wardrobe)
        change()
        now = str(self.wardrobe)
        if now == before:
            self.note(f"[{now}, as before]")
            return
        self.conversation.recompute(f"it is {now} now, and was {before}")
        again = "; the next turn runs the whole dialogue again" * bool(self.conversation.messages)
        self.note(f"[{now}{again}]")

    def _reset(self, rest: str) -> None:
        self.conversation.reset()
        self.waiting, self.shown = [], []
        self.note("[a new dialogue]")

    def _stats(self, rest: str) -> None:
        turn = self.conversation.turn
        told = "nothing was asked yet" if turn is None else describe(turn)
        self.note(f"[{self.wardrobe}] {told}")

    def _save(self, name: str) -> None:
        if not name:
            raise ValueError("/save: the name of a file is needed")
        if not self.conversation.messages:
            raise ValueError("/save: there is no dialogue yet; ask something first")
        path = named(name)
        line = json.dumps({"messages": self._messages(path.parent)})
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(line + "\n")
        except FileExistsError:
            raise ValueError(f"/save: {path} is there already; name another file") from None
        except OSError as error:
            raise ValueError(f"/save: {path} cannot be written ({error.strerror})") from None
        outside = [s.path for s in self.shown if not s.path.is_relative_to(path.parent)]
        root = ""
        if outside:
            common = os.path.commonpath([shown.path.parent for shown in self.shown])
            root = f"; its pictures lie elsewhere, so ask it with --image-root {common}"
        self.note(f"[saved to {path}{root}]")

    def _messages(self, folder: Path) -> list[dict[str, Any]]:
        """The dialogue with the files of its pictures, as `Question.from_record` reads it."""
        paths = iter([shown.path for shown in self.shown])
        inside = all(shown.path.is_relative_to(folder) for shown in self.shown)

        def part(content: dict[str, Any]) -> dict[str, Any]:
            if content["type"] != "image":
                return content
            path = next(paths)
            return {**content, "path": str(path.relative_to(folder) if inside else path)}

        return [
            {**message, "content": [part(content) for content in message["content"]]}
            for message in self.conversation.messages
        ]


def describe(turn: Turn) -> str:
    """The figures of a turn, for people."""
    visual = ""
    if turn.visual_layer_average is not None:
        visual = (
            f"visual tokens {turn.visual_in} -> {turn.visual_stage1} -> {turn.visual_stage2} "
            f"(layer average {turn.visual_layer_average:.1%}); "
        )
    return (
        f"{visual}prompt tokens {turn.tokens_new} run, {turn.tokens_cached} known; KV cache "
        f"{turn.kv_entries} entries, {turn.kv_bytes / 1024:.0f} KiB; first token after "
        f"{turn.first_token_s:.3f} s, {turn.tokens_out} tokens after {turn.total_s:.3f} s"
    )
