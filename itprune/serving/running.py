"""Batch: answers under way on one model, row beside row; prompts join and answers leave any time.

Prompts that wear the same pruner run through one ragged packed prefill, and their caches are joined
into the batch's own. From then on nothing is chosen any more, so rows of every method and `keep`
decode together, in the host model's own forward. An answer is the one its question would get alone.

Legend: B rows, S prompt tokens of the longest of a prefill.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from itprune.answer import Answerer, Encoded
from itprune.attach import Attached
from itprune.axes import axes_ids
from itprune.decoding import Decoding, row_seed
from itprune.engine.masks import added_mask
from itprune.families import find_family
from itprune.report import Report
from itprune.serving.joining import JoinedCache
from itprune.serving.prefilled import Prefilled, layer_windows
from itprune.serving.saying import Said, Sampler
from itprune.tokens import Sparsity


@dataclass(frozen=True, eq=False)
class Asked:
    """A question ready for the model, and how its answer is drawn."""

    encoded: Encoded
    """From `Answerer.encode`."""
    decoding: Decoding = field(default_factory=Decoding)
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are no part of it."""


@dataclass(frozen=True)
class Cost:
    """What a prompt costs."""

    tokens_in: int
    """Before pruning, image tokens included."""
    tokens_kept: int
    """Into the language model."""
    visual_in: int
    visual_kept: int
    kv_entries: int
    """Cached tokens after the prompt, summed over layers."""


@dataclass(eq=False)
class Row:
    """One answer under way."""

    asked: Asked
    room: int
    """Tokens it may have."""
    said: Said
    stream: torch.Generator
    prompt: list[int]
    own: LogitsProcessorList
    """What the model itself does to its scores."""
    cost: Cost | None = None
    """Known when the prompt has run."""
    finish: str | None = None
    """stop: the model, or a stop string, ended it; length: it was cut; None: it goes on."""

    @property
    def decoding(self) -> Decoding:
        return self.asked.decoding

    @property
    def seen(self) -> list[int]:
        """Tokens of prompt and answer so far."""
        return self.prompt + self.said.ids


@dataclass(frozen=True)
class Event:
    """One more token of a row."""

    row: Row
    token: int
    text: str
    """What is new to be read; often nothing. All texts of a row together are its answer."""
    finish: str | None
    """As of the row; not None: this is its last token, and it has left the batch."""


def check_joins(attached: Attached | None) -> None:
    """Refuses a pruner whose rows need it when they decode.

    Raises:
        ValueError: layers that must not see the visual tokens they hold.
    """
    if attached is None or attached.method.idle:
        return
    spared = [attached.method.sparsity(layer) for layer in range(attached.method.depth)]
    if any(spare is not None and _hides(spare) for spare in spared):
        raise ValueError(
            f"method {attached.config.method!r} spares compute while it decodes, too, so its "
            "answers cannot be made beside others; choose another method"
        )


def _hides(spare: Sparsity) -> bool:
    """Whether a layer holds visual tokens that some of its heads must not see. (Blind layers hold
    none, unless the published arithmetic is asked for.)"""
    return spare.heads is not None or (spare.blind and spare.zero_after_softmax)


class Batch:
    """The rows under way.

    Not for several threads. `answerer.loaded.attached` is what the next prompts wear.

    Args:
        answerer: of the model.

    Raises:
        ValueError: a model whose cache is not made of keys and values.
    """

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer
        self.model: Any = answerer.model
        self.windows = layer_windows(answerer.text_config)
        self.rows: list[Row] = []
        self.cache = JoinedCache(self.windows, self.model.device)
        self._family = find_family(answerer.model)
        self._sampler = Sampler(answerer)
        self._tokens: Tensor | None = None
        self._handles = [
            layer.register_forward_pre_hook(
                functools.partial(self._before_layer, index), with_kwargs=True
            )
            for index, layer in enumerate(self._family.layers)
        ]

    def close(self) -> None:
        """Gives the model back as it was, and all memory."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.cancel(list(self.rows))

    @property
    def kv_bytes(self) -> int:
        """What the caches of all rows take, unused space included."""
        return self.cache.nbytes

    def room(self, asked: Asked) -> int:
        """Tokens an answer may have: as asked for, within the model's context."""
        context: int = self.answerer.text_config.max_position_embeddings
        return min(asked.decoding.max_new_tokens, context - asked.encoded.length)

    # ------------------------------------------------------------------------ prompts
    @torch.no_grad()
    def add(self, asked: Sequence[Asked]) -> list[Event]:
        """Runs prompts together, as the model is dressed now, and lets them join.

        When it raises, nobody has joined and the batch is as before.

        Returns:
            The first token of each.

        Raises:
            ValueError: prompts that cannot be one batch, or a pruner that works on while decoding.
        """
        check_joins(self.answerer.loaded.attached)
        rows = [self._row(one) for one in asked]
        inputs = self.answerer.collate([one.encoded for one in asked])
        mask = inputs["attention_mask"].bool()
        ids = self._position_ids(asked, mask)
        before = self._report()
        # A batch of one axis is told (B, S) ids, one of several (4, B, S).
        given = ids if len(ids) > 1 else ids[0]
        out = self.model(**inputs, position_ids=given, use_cache=True, logits_to_keep=1)
        prefilled = Prefilled(out.past_key_values, mask, ids[..., -1] + 1, self.windows)
        self._note_costs(rows, prefilled, before)
        events = self._say(rows, self._sampler(rows, out.logits[:, -1]))
        stay = [index for index, row in enumerate(rows) if row.finish is None]
        if stay:
            self.cache.join(prefilled, stay)
            self.rows += [rows[index] for index in stay]
            self._tokens = None
        return events

    def _row(self, asked: Asked) -> Row:
        encoded, decoding = asked.encoded, asked.decoding
        seed = row_seed(decoding.seed, encoded.inputs.values()) if decoding.temperature else 0
        prompt, room = encoded.inputs["input_ids"].tolist(), self.room(asked)
        return Row(
            asked,
            room,
            Said(self.answerer.processor.tokenizer, asked.stop),
            torch.Generator().manual_seed(seed),
            prompt,
            self._sampler.own(prompt, room),
        )

    def _position_ids(self, asked: Sequence[Asked], mask: Tensor) -> Tensor:
        """(axes, B, S) position ids of prompts padded on the left."""
        if self._family.position_axes == 1:
            return (mask.long().cumsum(1) - 1).clamp(min=0)[None]
        own = [axes_ids(self.model, one.encoded.inputs) for one in asked]
        ids = torch.zeros(len(own[0]), *mask.shape, dtype=torch.long)
        for row, part in enumerate(own):
            ids[:, row, mask.shape[1] - part.shape[-1] :] = part[:, 0]
        return ids.to(mask.device)

    def _report(self) -> Report | None:
        attached = self.answerer.loaded.attached
        return None if attached is None else attached.report

    def _note_costs(self, rows: list[Row], prefilled: Prefilled, before: Report | None) -> None:
        report = self._report()
        for index, (row, place) in enumerate(zip(rows, prefilled.rows, strict=True)):
            given = row.asked.encoded.inputs["input_ids"]
            visual = int(torch.isin(given, self.answerer.visual_ids).sum())
            kept, kept_visual = len(given), visual
            if report is not None and report is not before:
                kept, kept_visual = report.tokens_stage1[index], report.visual_stage1[index]
            row.cost = Cost(len(given), kept, visual, kept_visual, sum(place.counts))

    # ------------------------------------------------------------------------ steps
    @torch.no_grad()
    def step(self) -> list[Event]:
        """One more token for every row. When it raises, the batch is as before."""
        if not self.rows:
            return []
        self.cache.ready()
        if self._tokens is None:
            last = [row.said.ids[-1:] for row in self.rows]
            self._tokens = torch.tensor(last, device=self.model.device)
        out = self.model(
            input_ids=self._tokens,
            position_ids=self.cache.position_ids,
            past_key_values=self.cache,
            use_cache=True,
        )
        tokens = self._sampler(self.rows, out.logits[:, -1])
        self.cache.advance()
        events = self._say(self.rows, tokens)
        self._tokens = tokens[:, None]
        self.cancel([row for row in self.rows if row.finish is not None])
        return events

    def cancel(self, rows: Sequence[Row]) -> None:
        """Takes rows out; their memory is given back. Rows that are not in the batch are none."""
        gone = [index for index, row in enumerate(self.rows) if row in rows]
        if gone:
            order = self.cache.leave(gone)
            self.rows = [self.rows[index] for index in order]
            self._tokens = None

    def _say(self, rows: Sequence[Row], tokens: Tensor) -> list[Event]:
        """(B,) tokens, said by their rows."""
        return [self._one(row, id) for row, id in zip(rows, tokens.tolist(), strict=True)]

    def _one(self, row: Row, token: int) -> Event:
        text = row.said.add(token)
        if token in self.answerer.stops or row.said.ended:
            row.finish = "stop"
        elif len(row.said.ids) == row.room:
            row.finish = "length"
        if row.finish is not None:
            text += row.said.rest()
        return Event(row, token, text, row.finish)

    def _before_layer(self, index: int, layer: Any, args: Any, kwargs: Any) -> Any:
        """Hands a decoder layer of the batch's own steps the mask of its rows."""
        if kwargs.get("past_key_values") is not self.cache:
            return None
        own = self.cache.own[index]
        changed = {**kwargs, "attention_mask": self._mask(own.seen(), args[0].dtype)}
        columns = own.columns
        if columns is not None and columns.late is not None:
            if columns.tables is None:
                ids = self.cache.position_ids - columns.late[:, None]
                columns.tables = self._family.rotary(args[0], ids, index)
            changed["position_embeddings"] = columns.tables
        return args, changed

    def _mask(self, seen: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """As the host's kernel takes it."""
        kernel = self._family.text_model.config._attn_implementation
        if seen is None or "flash" in kernel:
            return seen
        shown = seen[:, None, None]
        return added_mask(shown, dtype) if "eager" in kernel else shown
