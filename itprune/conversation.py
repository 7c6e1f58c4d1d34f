"""Conversation: a dialogue with images whose KV cache is continued, so that a turn costs its own
tokens only.

Every turn renders the whole dialogue, as `Answerer` would. Where its tokens begin with those the
cache holds, only the rest is run; where they do not, or where a cache cannot take what is new, the
dialogue is run again from its first token and the turn says why. Either way the model sees the
same tokens, and an image keeps the tokens that were chosen when it came.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteriaList

from itprune.answer import Answerer, Encoded
from itprune.axes import axes_ids
from itprune.checkpoint import Loaded
from itprune.continuing import Held, Plan, Visual, plan_turn
from itprune.decoding import Clock, Decoding
from itprune.engine.cache import PrunedLayer
from itprune.families import find_family
from itprune.question import IMAGE, Question
from itprune.report import Report
from itprune.streaming import Text, TokenStream

UNFINISHED = "the turn before did not come to its end"


@dataclass(frozen=True)
class Turn:
    """An answer and what it cost."""

    answer: str
    finish: str
    """stop: the model ended it; length: it was cut; stopped: nobody read on."""
    tokens_out: int
    tokens_new: int
    """Prompt tokens run in this turn, image tokens included, before pruning."""
    tokens_cached: int
    """Prompt tokens, before pruning, that the cache already knew."""
    recomputed: str
    """Why the whole dialogue was run again; empty: it was not."""
    visual_in: int
    """Visual tokens of the whole dialogue."""
    visual_stage1: int
    """Those that entered the LLM."""
    visual_stage2: int
    """Those that reached its last layer."""
    visual_layer_average: float | None
    """Share of them kept, averaged over the LLM's layers; None without images."""
    kv_entries: int
    """Cached tokens behind the answer, summed over layers."""
    kv_bytes: int
    """Keys and values of these entries."""
    prepare_s: float
    """Resizing and tokenising the dialogue."""
    first_token_s: float
    """From the turn's start on the model to its first token."""
    total_s: float
    """To its last token."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Running:
    """A turn the model is at work on."""

    question: Question
    """The whole dialogue."""
    encoded: Encoded
    plan: Plan
    stream: TokenStream
    said: Text
    clock: Clock
    before: Report | None
    """What the pruner reported last."""


class Conversation:
    """A dialogue with one model.

    Between its turns the model may answer others; the pruner may change after `recompute`.

    Args:
        loaded: from `load_pretrained`; with no pruner attached the model runs dense.
        decoding: how answers are drawn.

    Raises:
        ValueError: the processor has no chat template.
    """

    def __init__(self, loaded: Loaded, decoding: Decoding | None = None) -> None:
        self.loaded = loaded
        self._answerer = Answerer(loaded, decoding)
        self._family = find_family(self._answerer.model)
        self._stream: TokenStream | None = None
        self.reset()

    def reset(self) -> None:
        """Begins anew, without turns."""
        self.messages: tuple[dict[str, Any], ...] = ()
        """Chat messages so far, the last answer included."""
        self.images: tuple[Image.Image, ...] = ()
        """What stands at the image places of the messages."""
        self.turn: Turn | None = None
        """The last answer and its cost."""
        self._held: Held | None = None
        self._why = ""
        self._wait()

    def _wait(self) -> None:
        """Until the model is free: somebody may have lost patience with a turn that was ending."""
        if self._stream is not None:
            self._stream.wait()
            self._stream = None

    def recompute(self, why: str) -> None:
        """The next turn runs the whole dialogue: after another pruner, or another `keep`.

        Args:
            why: what the turn then gives as its reason.
        """
        if self._held is not None:
            self._held, self._why = None, why

    # ------------------------------------------------------------------------------------ ask
    def ask(self, text: str, images: Sequence[Image.Image] = ()) -> Generator[str, None, None]:
        """Asks the next question.

        The turn is complete, and `turn` and `messages` know it, when the iterator has ended or was
        closed; closing it early ends the answer where it is. A turn that the next one, or `reset`,
        finds under way is lost.

        Args:
            text: the question. Without `<image>` in it, the images stand before it.
            images: those it brings.

        Returns:
            The answer in pieces, as they come.

        Raises:
            TooLong: the dialogue does not fit the model's context any more.
            ValueError: the question is empty or refused; the dialogue is as before.
        """
        added = Question.from_prompt(text, images)
        question = Question((*self.messages, *added.messages), (*self.images, *added.images))
        return self._pieces(question, self._answerer.encode(question))

    def _pieces(self, question: Question, encoded: Encoded) -> Generator[str, None, None]:
        self._wait()
        running = self._start(question, encoded)
        stream, said, through = running.stream, running.said, False
        try:
            for token in stream:
                piece = said.add(token)
                if piece:
                    yield piece
            through = True
        finally:
            out = _finish(stream)
            if self._stream is stream:  # else another turn, or a new dialogue, did not wait for it
                self._note(running, out, through)
        rest = said.rest()
        if rest:
            yield rest

    def _start(self, question: Question, encoded: Encoded) -> Running:
        plan = self._plan(encoded)
        # Until the model is through, the cache is in no state to be used.
        self._held, self._why = None, UNFINISHED if self.messages else ""
        clock, before = Clock(self._answerer.model.device), self._report()
        said = Text(self._answerer.processor.tokenizer)
        stream = TokenStream(lambda stream: self._generate(encoded, plan, [clock, stream]))
        self._stream = stream
        return Running(question, encoded, plan, stream, said, clock, before)

    def _generate(self, encoded: Encoded, plan: Plan, criteria: list[Any]) -> Any:
        answerer = self._answerer
        inputs: dict[str, Any] = answerer.collate([replace(encoded, inputs=plan.inputs)])
        if self._family.position_axes > 1:
            ids = axes_ids(answerer.model, encoded.inputs)
            inputs["position_ids"] = ids.to(answerer.model.device)
        if plan.held is not None:
            inputs["past_key_values"] = plan.held.cache
        generate: Any = answerer.model.generate
        return generate(
            **inputs,
            generation_config=answerer.settings(answerer.room(encoded)),
            logits_processor=answerer.sampler([encoded]),
            stopping_criteria=StoppingCriteriaList(criteria),
        )

    def _plan(self, encoded: Encoded) -> Plan:
        if self._held is None:
            return Plan(encoded.inputs, why=self._why)
        return plan_turn(encoded.inputs, self._held, self.loaded.attached)

    # ---------------------------------------------------------------------------------- figures
    def _report(self) -> Report | None:
        attached = self.loaded.attached
        return None if attached is None else attached.report

    def _visual(self, running: Running) -> Visual:
        """Visual tokens of the dialogue up to this turn."""
        plan, report = running.plan, self._report()
        known = Visual() if plan.held is None else plan.held.visual
        if report is not None and report is not running.before:
            last = list(report.visual_drops.values())[-1][0]
            given, stage1 = report.visual_in[0], report.visual_stage1[0]
            return known + Visual(given, stage1, last, report.visual_layer_tokens)
        new = plan.inputs["input_ids"][plan.start :]
        count = int(torch.isin(new, self._answerer.visual_ids).sum())
        return known + Visual(count, count, count, count * self._depth)

    @property
    def _depth(self) -> int:
        depth: int = self._answerer.text_config.num_hidden_layers
        return depth

    def _note(self, running: Running, out: Any, through: bool) -> None:
        """Takes in a turn that is over.

        Args:
            running: the turn.
            out: what `generate` returned.
            through: all tokens were read.
        """
        question, encoded, visual = running.question, running.encoded, self._visual(running)
        history = self._without_places(running.said.whole())
        self.messages = (*question.messages, _answered(history))
        self.images = question.images
        run = out.sequences[0].tolist()[:-1]  # the last token was said, and not run
        self._held = Held(out.past_key_values, run, encoded.length, encoded.inputs, visual)
        self._why = ""
        self.turn = self._turn(running, self._held, through)

    def _turn(self, running: Running, held: Held, through: bool) -> Turn:
        ids, plan, layers = running.said.ids, running.plan, held.cache.layers
        ended = "stop" if ids and ids[-1] in self._answerer.stops else "length"
        visual = held.visual
        whole = self._depth * visual.given
        return Turn(
            answer=running.said.whole(),
            finish=ended if through else "stopped",
            tokens_out=len(ids),
            tokens_new=held.prompt - plan.start,
            tokens_cached=plan.start,
            recomputed=plan.why,
            visual_in=visual.given,
            visual_stage1=visual.stage1,
            visual_stage2=visual.stage2,
            visual_layer_average=visual.layers / whole if whole else None,
            kv_entries=sum(_entries(layer) for layer in layers),
            kv_bytes=sum(layer.keys.nbytes + layer.values.nbytes for layer in layers),
            prepare_s=running.encoded.prepare_s,
            first_token_s=running.clock.ticks[0],
            total_s=running.clock.ticks[len(ids) - 1],
        )

    def _without_places(self, answer: str) -> str:
        """An answer as history: a model may spell what stands for an image, and there is none."""
        places = (IMAGE, *self._answerer.reserved)
        while any(place in answer for place in places):  # one may stand inside another
            for place in places:
                answer = answer.replace(place, "")
        return answer


def _finish(stream: TokenStream) -> Any:
    """What `generate` returned.

    Raises:
        ValueError: memory does not suffice, or the model refuses the turn.
    """
    try:
        return stream.finish()
    except torch.OutOfMemoryError:
        raise ValueError(
            "the device's memory does not hold this dialogue; begin a new one, or keep fewer tokens"
        ) from None


def _answered(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _entries(layer: Any) -> int:
    """Entries a cache layer holds of its one sample."""
    return int(layer.entries()[0]) if isinstance(layer, PrunedLayer) else layer.keys.shape[-2]
