"""Backend: what stands behind the endpoint, a model of our own or servers elsewhere.

The server reads, limits and refuses; a backend is asked what has passed that, and answers piece by
piece. Both live on one event loop: whatever takes long runs elsewhere.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from itprune.question import Question


class Unavailable(Exception):
    """A request that could be answered, but not now: one sentence, told with status 503."""


class Broken(Exception):
    """An answer that failed by no fault of its request: one sentence, told with status 500."""


@dataclass(frozen=True)
class Request:
    """One question, within the limits of the server."""

    question: Question
    max_new_tokens: int
    """Longest answer; it may be cut further by the context."""
    temperature: float
    """0: greedy."""
    top_p: float
    seed: int
    stop: tuple[str, ...]
    """Texts that end the answer and are no part of it."""
    method: str
    keep: float
    """1.0: nothing is pruned, whatever the method."""


@dataclass(frozen=True)
class Usage:
    """What a request costs."""

    tokens_in: int
    """Prompt tokens before pruning, image tokens included."""
    tokens_kept: int
    """Those that enter the language model."""
    visual_in: int
    visual_kept: int
    tokens_out: int
    """Tokens of the answer so far, the one that ends it included."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer. All texts of an answer together are the whole of it."""

    text: str
    """Often empty: half of a letter waits for its other half."""
    usage: Usage
    """Up to this piece."""
    finish: str | None = None
    """stop: the model, or a stop string, ended it; length: it was cut. The last piece has it, and
    only that one."""


class Stream(Protocol):
    """Pieces of one answer as they come; the first when the first token is there.

    Iterating may raise `Unavailable`, `Broken` or, in front of the first piece only, ValueError:
    what is wrong with the request, in one sentence.
    """

    def __aiter__(self) -> AsyncIterator[Piece]: ...

    async def aclose(self) -> None:
        """Nobody listens any more: what is under way ends, what is in line leaves it. Harmless
        where the answer is through, or was never read."""


@dataclass(frozen=True)
class Facts:
    """What the server has to know of the model."""

    name: str
    """What clients call it."""
    context: int
    """Tokens of prompt and answer together."""
    created: int
    """Seconds since 1970."""
    methods: tuple[str, ...]
    """That fit it."""
    method: str
    """Of a request that names none."""
    keep: float
    """Of a request that names none."""


@dataclass(frozen=True)
class Gauge:
    """A figure that goes up and down, for /metrics."""

    name: str
    """Without the prefix `itprune_`."""
    meaning: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


class Backend(Protocol):
    """Answers requests. Called on the server's event loop only, between `start` and `close`."""

    def facts(self) -> Facts: ...

    async def start(self) -> None:
        """Begins to work; called once."""

    async def close(self) -> None:
        """Ends everything, answers under way included."""

    async def ask(self, request: Request) -> Stream:
        """Takes a request in: it is encoded, and stands in line when this returns.

        Raises:
            ValueError: what is wrong with the request, in one sentence without paths.
            Unavailable: it cannot be answered now.
        """

    def trouble(self) -> str:
        """Why no request could be answered now, in one sentence; empty: they can."""

    def gauges(self) -> Sequence[Gauge]:
        """Figures of this moment."""
