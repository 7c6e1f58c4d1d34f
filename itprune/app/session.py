"""Session: one model in memory, which answers one question at a time with any method that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

from itprune.answer import Answerer, Encoded
from itprune.app.kept import kept_patches
from itprune.app.limits import Limits
from itprune.app.streaming import Listener, StreamingAnswerer
from itprune.app.where import Spot, find_spots
from itprune.attach import Attached
from itprune.calibration import Calibration
from itprune.checkpoint import Loaded
from itprune.comparing.entries import DENSE, Case, Entry
from itprune.comparing.subject import Subject
from itprune.config import PruneConfig
from itprune.decoding import Decoding
from itprune.families import find_family
from itprune.methods import methods
from itprune.options import check_choice, check_fraction
from itprune.question import Question
from itprune.trace import Trace
from itprune.web.pictures import read_picture
from itprune.web.texts import as_text

PRUNED = "pruned"
UNCALIBRATED = "not calibrated for this model: it may keep more or fewer tokens than asked for"
Event = dict[str, Any]
Tell = Callable[[Event], None]


@dataclass(frozen=True)
class Ask:
    """One question of a visitor."""

    picture: bytes
    """A picture's file."""
    prompt: str
    method: str
    keep: float
    max_new_tokens: int
    beside: bool
    """Answer with the dense model, too."""


class Session:
    """The model behind the page.

    Args:
        loaded: from `load_pretrained`; its pruner says what the page starts with.
        name: what the page calls the model.
        limits: of the server.

    Raises:
        ValueError: the model cannot be asked, or its own method does not fit it.
    """

    def __init__(self, loaded: Loaded, name: str, limits: Limits) -> None:
        attached, self.name, self.limits = loaded.attached, name, limits
        self.calibration = attached.calibration if attached is not None else None
        self.subject = Subject(loaded)
        self.family = find_family(self.subject.model)
        start = self.subject.own or PruneConfig()
        self.method = PruneConfig().method if start.method == DENSE else start.method
        self.keep = start.final_keep or PruneConfig().final_keep or 1.0
        self.offered = self._offered()

    def facts(self) -> dict[str, Any]:
        """What the page has to know."""
        return {
            "model": self.name,
            "family": self.subject.model.config.model_type,
            "methods": list(self.offered.values()),
            "method": self.method,
            "keep": self.keep,
            "limits": asdict(self.limits),
        }

    def check(self, ask: Ask) -> None:
        """Refuses what cannot be asked, before it waits for its turn.

        Raises:
            ValueError: in one sentence.
        """
        check_choice("method", ask.method, self.offered)
        check_fraction("keep", ask.keep)
        if not ask.prompt.strip():
            raise ValueError("the question is empty; type one")
        if len(ask.prompt) > self.limits.prompt:
            raise ValueError(
                f"the question has {len(ask.prompt)} characters, more than {self.limits.prompt}; "
                "shorten it"
            )
        if not 1 <= ask.max_new_tokens <= self.limits.answer:
            raise ValueError(
                f"an answer may have 1 to {self.limits.answer} tokens, not {ask.max_new_tokens}"
            )
        read_picture(ask.picture, self.limits.pixels)

    def answer(self, ask: Ask, tell: Tell, stopped: Callable[[], bool]) -> None:
        """Answers on the model, pruned and then dense where that is asked for.

        Args:
            ask: checked.
            tell: is told events: start, kept, text and done of each column.
            stopped: whether nobody listens any more.

        Raises:
            ValueError: this model, method or budget cannot do it.
            Stopped: nobody listened any more.
        """
        case = Case(Entry(ask.method, ask.method), ask.keep)
        with self.subject.wearing(case, self._calibrated(ask.method)) as attached:
            self._column(PRUNED, ask, attached, tell, stopped)
        if ask.beside:
            self._column(DENSE, ask, None, tell, stopped)

    def _column(
        self,
        column: str,
        ask: Ask,
        attached: Attached | None,
        tell: Tell,
        stopped: Callable[[], bool],
    ) -> None:
        loaded = Loaded(self.subject.loaded.model, self.subject.loaded.processor, attached)
        answerer = StreamingAnswerer(loaded, Decoding(max_new_tokens=ask.max_new_tokens))
        picture = read_picture(ask.picture, self.limits.pixels)
        prompt = as_text(ask.prompt, answerer.reserved).strip()
        encoded = answerer.encode(_question(prompt, picture))
        spots = self._spots(answerer, prompt, picture.size) if attached is not None else []
        trace = Trace()

        def prefilled() -> None:
            kept = kept_patches(trace, spots)
            if kept is not None:
                tell({"kind": "kept", "column": column, **kept})

        listener = Listener(
            prefilled=prefilled,
            piece=lambda text: tell({"kind": "text", "column": column, "text": text}),
            stopped=stopped,
            seconds=self.limits.seconds,
        )
        tell({"kind": "start", "column": column})
        if attached is None:
            answer = answerer.stream(encoded, listener)
        else:
            with attached.tracing() as trace:
                answer = answerer.stream(encoded, listener)
        finish = "time" if listener.late else answer.finish
        tell({"kind": "done", "column": column, **answer.to_dict(), "finish": finish})

    def _spots(self, answerer: Answerer, prompt: str, size: tuple[int, int]) -> list[Spot]:
        def encode(picture: Image.Image) -> Encoded:
            return answerer.encode(_question(prompt, picture))

        return find_spots(self.family, answerer.processor, size, encode)

    def _calibrated(self, method: str) -> Calibration | None:
        """The checkpoint's calibration, where it is this method's."""
        own = self.subject.own is not None and self.subject.own.method == method
        return self.calibration if own else None

    def _offered(self) -> dict[str, dict[str, str]]:
        """What the page says of the methods that run on this model as it is, its own first."""
        found = dict[str, dict[str, str]]()
        for name in (self.method, *methods()):
            if name == DENSE:
                continue
            try:
                with self.subject.wearing(Case(Entry(name, name), 1.0)) as attached:
                    method = attached.method
                    note = UNCALIBRATED if method.calibrates and not self._calibrated(name) else ""
                    found[name] = {"name": name, "title": method.card.title, "note": note}
            except ValueError:  # it does not fit this model, or needs training
                if name == self.method:
                    raise
        return found


def _question(prompt: str, picture: Image.Image) -> Question:
    """The picture, then the prompt."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    return Question(({"role": "user", "content": content},), (picture,))
