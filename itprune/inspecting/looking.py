"""Looking: one question, asked dense and pruned, with everything the pruner chose.

The choices come from the reading of the prompt inside `generate`, the very way of an answer. They
are traced apart from the timed answers, since tracing computes scores a method may not need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from itprune.answer import Answer, Answerer, Encoded
from itprune.checkpoint import Loaded
from itprune.decoding import Decoding
from itprune.families import find_family
from itprune.inspecting.places import Place, find_places
from itprune.inspecting.rules import Curve, make_curve
from itprune.inspecting.shading import Mask
from itprune.inspecting.words import Word, prompt_words
from itprune.question import Question
from itprune.trace import Trace


@dataclass(frozen=True)
class Label:
    """How the page shows a question."""

    text: str
    name: str = ""
    """Of its picture, or of its record."""
    references: tuple[str, ...] = ()
    """Right answers, where the data has them."""


@dataclass(frozen=True)
class Grid:
    """One grid of visual tokens: its picture, what stays of it, its scores."""

    place: Place
    alive: dict[int, Mask]
    """First layer of each segment -> (rows, columns) bool."""
    curve: Curve | None
    """None: nothing was chosen before the LLM, or on a picture of another size."""


@dataclass(frozen=True)
class Look:
    """Everything about one question."""

    label: Label
    pruned: Answer
    dense: Answer
    grids: tuple[Grid, ...]
    words: tuple[Word, ...]
    layer_tokens: tuple[int, ...]
    """Tokens in each LLM layer."""
    starts: tuple[int, ...]
    """First layer of each segment."""

    @property
    def visual_counts(self) -> tuple[int, ...]:
        """Visual tokens of the prompt, then of each segment."""
        runs = [word.counts for word in self.words if word.kind == "visual"]
        return tuple(sum(column) for column in zip(*runs, strict=True))


class Looker:
    """Looks at questions with one model.

    Args:
        loaded: with a pruner attached.
        max_new_tokens: of the answers.

    Raises:
        ValueError: the model wears no pruner.
    """

    def __init__(self, loaded: Loaded, max_new_tokens: int) -> None:
        if loaded.attached is None:
            raise ValueError("nothing is pruned here; name a --method or a --keep")
        self.loaded, self.attached = loaded, loaded.attached
        self.answerer = Answerer(loaded, Decoding(max_new_tokens))
        self.reader = Answerer(loaded, Decoding(max_new_tokens=1))
        self.family = find_family(self.answerer.model)
        self.depth = len(self.family.layers)

    def __call__(self, question: Question, label: Label) -> Look:
        """Looks at one question.

        Raises:
            ValueError: what is wrong with it, in one sentence.
        """
        encoded = self.answerer.encode(question)
        trace = self.trace(encoded)
        alive = {layer: mask[0].cpu() for layer, mask in trace.alive.items()}
        return Look(
            label=label,
            pruned=self.answerer.answer([encoded])[0],
            dense=self.dense(encoded),
            grids=self._grids(encoded, question, trace),
            words=tuple(self._words(encoded, trace)),
            layer_tokens=_per_layer({k: int(mask.sum()) for k, mask in alive.items()}, self.depth),
            starts=tuple(sorted(alive)),
        )

    def dense(self, encoded: Encoded) -> Answer:
        """The same model's answer on all tokens."""
        with self.attached.aside(1.0):
            return self.answerer.answer([encoded])[0]

    def trace(self, encoded: Encoded) -> Trace:
        """The choices while the prompt is read; where the model ran dense, all tokens live."""
        with self.attached.tracing() as trace:
            self.reader.answer([encoded])
        if trace.visual is None:
            ids = encoded.inputs["input_ids"][None]
            trace.visual = torch.isin(ids, self.answerer.visual_ids)
            trace.alive = {0: torch.ones_like(trace.visual)}
        return trace

    # -------------------------------------------------------------------------------- parts
    def _grids(self, encoded: Encoded, question: Question, trace: Trace) -> tuple[Grid, ...]:
        assert trace.visual is not None
        visual = trace.visual[0].cpu()
        alive = {layer: mask[0].cpu()[visual] for layer, mask in trace.alive.items()}
        processor = self.loaded.processor
        places = find_places(self.family, processor, encoded.inputs, question.images)
        return tuple(
            Grid(
                place,
                {
                    layer: mask[place.index].view(place.rows, place.columns).numpy()
                    for layer, mask in sorted(alive.items())
                },
                self._curve(place, places, trace),
            )
            for place in places
        )

    def _curve(self, place: Place, places: Sequence[Place], trace: Trace) -> Curve | None:
        if trace.score is None or trace.keep is None:
            return None
        end = int(max(int(p.token.max()) for p in places)) + 1
        if len(trace.score) != end or len(trace.keep) != end:  # it was made smaller before
            return None
        share = self.attached.enters
        score, keep = trace.score.cpu()[place.token], trace.keep.cpu()[place.token]
        return make_curve(score, keep, share if share < 1 else None)

    def _words(self, encoded: Encoded, trace: Trace) -> list[Word]:
        assert trace.visual is not None
        alive = {layer: mask[0].cpu() for layer, mask in trace.alive.items()}
        ids, visual = encoded.inputs["input_ids"].tolist(), trace.visual[0].tolist()
        return prompt_words(ids, visual, alive, self.answerer.processor.tokenizer)


def _per_layer(starts: dict[int, int], depth: int) -> tuple[int, ...]:
    """First layer of each segment -> its value, as one value a layer."""
    out: list[int] = []
    for layer in range(depth):
        out.append(starts[layer] if layer in starts else out[-1])
    return tuple(out)
