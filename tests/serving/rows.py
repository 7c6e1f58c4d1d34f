"""Requests to tiny models of every family, answered alone and in a running batch."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from itprune import PruneConfig, attach
from itprune.answer import Answerer, Encoded
from itprune.checkpoint import Loaded
from itprune.decoding import Decoding
from itprune.families import find_family
from itprune.inputs import PER_TOKEN
from itprune.serving.running import Asked, Batch, Event, Row
from tests import family_models, tiny_llava
from tests.oracle import HashChoice  # noqa: F401  (registers hash_choice)

PROMPTS: tuple[tuple[int | str, ...], ...] = (
    (5, "image", 9),
    (3, "wide", 4),
    (2, "image", 3, "wide", 6),
    (12,),
    (1, "image", 17),
    (4,),
)
STYLES: dict[str, PruneConfig | None] = {
    "dense": None,
    "itprune": PruneConfig(keep=0.3),
    "hash": PruneConfig("hash_choice", keep=0.5),
    "layers": PruneConfig("fastv", keep=0.4),
    "renumbered": PruneConfig("fastv", keep=0.4, positions="contiguous"),
}


@functools.cache
def processor() -> Any:
    """Any will do: requests come as tokens and pixels."""
    return tiny_llava.build_processor()


class Asking:
    """A model of a family, dressed as told, and requests to it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model = family_models.build(name)
        self.answerer = Answerer(Loaded(self.model, processor(), None))
        self.axes = find_family(self.model).position_axes
        self._alone: dict[Any, tuple[list[int], list[Tensor]]] = {}

    @property
    def styles(self) -> list[str]:
        return [name for name in STYLES if name != "renumbered" or self.axes == 1]

    @contextmanager
    def wearing(self, style: str) -> Iterator[None]:
        config, loaded = STYLES[style], self.answerer.loaded
        torch.manual_seed(0)  # of methods with parts to be trained
        loaded.attached = config and attach(self.model, config)
        try:
            yield
        finally:
            if loaded.attached is not None:
                loaded.attached.detach()
            loaded.attached = None

    @functools.cache  # noqa: B019  (as many as tests of a family)
    def encoded(self, prompt: int) -> Encoded:
        data = family_models.batch(self.name, self.model, PROMPTS, order=[prompt])
        del data["labels"]
        rows = {key: value[0] if key in PER_TOKEN else value for key, value in data.items()}
        return Encoded(rows, 0.0)

    def asked(self, prompt: int, tokens: int, **decoding: Any) -> Asked:
        return Asked(self.encoded(prompt), Decoding(max_new_tokens=tokens, **decoding))

    def alone(
        self, style: str, prompt: int, tokens: int, **decoding: Any
    ) -> tuple[list[int], list[Tensor]]:
        """Tokens and logits of the model's own `generate`, asked this one question."""
        key = (style, prompt, tokens, *decoding.items())
        if key not in self._alone:
            self.answerer.decoding = Decoding(max_new_tokens=tokens, **decoding)
            with self.wearing(style), logits_of(self.model) as seen:
                inputs = self.answerer.collate([self.encoded(prompt)])
                out = self.model.generate(
                    **inputs,
                    generation_config=self.answerer.settings(tokens),
                    logits_processor=self.answerer.sampler([self.encoded(prompt)]),
                )
            said = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
            self._alone[key] = said, [logits[0] for logits in seen]
        return self._alone[key]


@contextmanager
def logits_of(model: Any) -> Iterator[list[Tensor]]:
    """(B, vocab) of every forward inside."""
    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda *args: seen.append(args[-1].logits[:, -1].detach()))
    try:
        yield seen
    finally:
        handle.remove()


@dataclass
class Watched:
    """A running batch, and what its rows said from which logits."""

    asking: Asking
    batch: Batch = field(init=False)
    tokens: dict[Row, list[int]] = field(default_factory=dict)
    logits: dict[Row, list[Tensor]] = field(default_factory=dict)
    of: dict[Row, tuple[str, Asked]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.batch = Batch(self.asking.answerer)

    def add(self, style: str, asked: Sequence[Asked]) -> list[Row]:
        with self.asking.wearing(style), logits_of(self.asking.model) as seen:
            events = self.batch.add(asked)
        self._note(events, seen)
        for event in events:
            self.of[event.row] = style, event.row.asked
        return [event.row for event in events]

    def step(self, style: str = "dense") -> list[Event]:
        """One step, whatever the model wears meanwhile."""
        with self.asking.wearing(style), logits_of(self.asking.model) as seen:
            events = self.batch.step()
        if events:
            self._note(events, seen)
        return events

    def _note(self, events: list[Event], seen: list[Tensor]) -> None:
        for event, logits in zip(events, seen[-1], strict=True):
            self.tokens.setdefault(event.row, []).append(event.token)
            self.logits.setdefault(event.row, []).append(logits)
