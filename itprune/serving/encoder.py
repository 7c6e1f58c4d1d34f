"""Encoder: questions in, the rows a language model elsewhere is to read out.

Vision tower, stage 1 and projector run here, through the hooks that prune everywhere; only what
stays leaves. What happens inside the language model, such as stage 2, has no place in this: `keep`
is then met by stage 1 alone, and positions count what stays.

Legend: T prompt tokens with all image tokens, K tokens that stay, V those that are visual, W width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from itprune.answer import Answerer, Encoded, TooLong
from itprune.attach import Attached, attach, check_budgets
from itprune.checkpoint import Loaded, load_pretrained
from itprune.config import PruneConfig
from itprune.dressing import Dress
from itprune.engine.encoder import flat_features
from itprune.families import find_family
from itprune.methods import methods
from itprune.options import check_fraction
from itprune.prompt import PromptFormat
from itprune.question import Question
from itprune.serving.elsewhere import before_llm, check_family, own_dress


@dataclass(frozen=True)
class Prepared:
    """A question's tokens and pixels."""

    question: Question
    encoded: Encoded
    messages: tuple[dict[str, Any], ...]
    """As training saw them, the ends of answers included."""
    special: bool
    """The tokenizer adds its special tokens to what the template writes."""


@dataclass(frozen=True)
class Rows:
    """What a language model is to read for one question."""

    prepared: Prepared
    ids: Tensor
    """(K,) token ids; placeholders where rows of images stand."""
    visual: Tensor
    """(K,) bool: where."""
    features: Tensor
    """(V, W) the rows of all images, one behind the other."""
    images: tuple[int, ...]
    """Rows of each image, where `together`; else of each run of them."""
    visual_in: int
    """Visual tokens before pruning."""

    @property
    def tokens_in(self) -> int:
        """Prompt tokens before pruning, image tokens included."""
        return self.prepared.encoded.length

    @property
    def tokens_kept(self) -> int:
        return len(self.ids)

    @property
    def visual_kept(self) -> int:
        return len(self.features)

    def room(self, context: int) -> int:
        """Tokens a context has left for the answer, at least one.

        Raises:
            TooLong: it has none.
        """
        if self.tokens_kept >= context:
            raise TooLong(
                f"the prompt has {self.tokens_kept} tokens that stay, but the context of the model "
                f"holds {context}; shorten it, use fewer images or keep less of them"
            )
        return context - self.tokens_kept

    def each(self) -> tuple[Tensor, ...]:
        """(n, W) rows of each image."""
        return self.features.split(list(self.images))


class Encoder:
    """Encodes questions with the vision half of a model. Not for several threads at once.

    Args:
        loaded: from `load_pretrained(…, llm=False)`, or a whole model; the pruner at work is
            replaced by one that ends before the language model.
        same_count: every image keeps this many rows, whatever is asked for; None: as asked.
        dtype: of what comes out; None: that of the model's token embeddings.

    Raises:
        ValueError: a family that cannot be served so, or a pruner that works elsewhere.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        same_count: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.loaded, self.same_count = loaded, same_count
        self.answerer = Answerer(loaded)
        self.model: Any = self.answerer.model
        self.family = find_family(self.model)
        self.together = check_family(self.model.config.model_type)
        self.table: Tensor = self.model.get_input_embeddings().weight.detach()
        self.dtype = dtype or self.table.dtype
        self._own = before_llm(own_dress(loaded, same_count, self.family), self.family)
        self.method = self._own.config.method
        self.keep = self._share(same_count) if same_count else self._own.config.final_keep
        self.context: int = self.answerer.text_config.max_position_embeddings
        self._prompt = PromptFormat.from_processor(loaded.processor)
        self._worn: str | None = None
        self._wear(self.method, self.keep)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        keep: float | None = None,
        method: str | None = None,
        same_count: int | None = None,
        dtype: torch.dtype | None = None,
        device: str | None = None,
    ) -> Encoder:
        """Opens a checkpoint; of its language model nothing is read but the token embeddings.

        Args:
            folder, keep, method, device: see `load_pretrained`.
            same_count, dtype: see the class.
        """
        loaded = load_pretrained(folder, keep=keep, method=method, device=device, llm=False)
        return cls(loaded, same_count=same_count, dtype=dtype)

    # ------------------------------------------------------------------------ what may be asked
    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods that fit."""
        if self.same_count is not None:
            return (self.method,)
        return (self.method, *(one for one in methods() if one != self.method and self._fits(one)))

    @property
    def usual_keep(self) -> float:
        """What a request gets that names no budget, also where the method has a rule of its own."""
        usual = PruneConfig().final_keep if self.keep is None else self.keep
        assert usual is not None
        return usual

    def check(self, method: str, keep: float | None) -> None:
        """Refuses a method or budget that cannot be had.

        Raises:
            ValueError: in one sentence.
        """
        check_fraction("keep", keep)
        if self.same_count is not None and (method, keep) != (self.method, self.keep):
            raise ValueError(
                f"every image keeps {self.same_count} tokens here; leave keep and method out"
            )
        if method != self.method:
            before_llm(Dress(PruneConfig(method)), self.family)

    def _fits(self, name: str) -> bool:
        try:
            before_llm(Dress(PruneConfig(name)), self.family)
        except ValueError:
            return False
        return True

    def _share(self, count: int) -> float:
        """What `same_count` is of an image's tokens."""
        rows, columns = self.family.host.grid
        return min(1.0, count / (rows * columns))

    # ------------------------------------------------------------------------ the pruner
    def _wear(self, name: str, keep: float | None) -> None:
        """Puts a pruner on.

        Raises:
            ValueError: it does not fit, or not this budget.
        """
        attached = self.loaded.attached
        if attached is None or self._worn != name:
            attached = self._change(name)
        budget = None if self.same_count is not None else keep
        check_budgets(attached.method, [budget])
        attached.set_keep(budget)

    def _change(self, name: str) -> Attached:
        own = name == self.method
        dress = self._own if own else before_llm(Dress(PruneConfig(name)), self.family)
        if self.loaded.attached is not None:
            self.loaded.attached.detach()
            self.loaded.attached = self._worn = None
        attached = attach(
            self.loaded.model, dress.config, prompt=self._prompt, calibration=dress.calibration
        )
        attached.method.load_state_dict(dress.weights)
        attached.method.to(next(self.family.tower.parameters()).device)
        self.loaded.attached, self._worn = attached, name
        return attached

    # ------------------------------------------------------------------------ encoding
    def prepare(self, question: Question) -> Prepared:
        """Renders, tokenises and resizes a question; may run beside `encode`.

        Raises:
            ValueError: what is wrong with it.
        """
        answerer = self.answerer
        special = not answerer.plain and answerer.prompt(question)[1]
        messages = tuple(answerer.ended(message) for message in question.messages)
        return Prepared(question, answerer.prepare(question), messages, special)

    @torch.no_grad()
    def encode(
        self, batch: Sequence[Prepared], method: str | None = None, keep: float | None = None
    ) -> list[Rows]:
        """Encodes questions together.

        Args:
            batch: the questions.
            method: of pruning; None: the checkpoint's.
            keep: share of the visual tokens that stays, on average; None: the checkpoint's.

        Raises:
            ValueError: the model refuses one of them, their images do not go together, or an
                image keeps nothing.
        """
        self._wear(method or self.method, self.keep if keep is None else keep)
        flat, sizes = self._features(batch)
        rows, start, first = [], 0, 0
        for one in batch:
            places = torch.isin(one.encoded.inputs["input_ids"], self.answerer.visual_ids)
            end, last = start + int(places.sum()), first + len(one.question.images)
            rows.append(self._rows(one, places, flat[start:end], sizes[first:last]))
            start, first = end, last
        return rows

    def each(
        self, batch: Sequence[Prepared], method: str | None = None, keep: float | None = None
    ) -> list[Rows | ValueError]:
        """One result for each question. Those that fail together are encoded alone, so that one is
        to blame; see `encode`."""
        try:
            return [*self.encode(batch, method, keep)] if batch else []
        except ValueError as error:
            if len(batch) == 1:
                return [error]
            return [found for one in batch for found in self.each([one], method, keep)]

    def text(self, one: Prepared) -> Rows:
        """The rows of a question without images, for which nothing has to run."""
        none = self.table.new_zeros(0, self.table.shape[1], dtype=self.dtype)
        return self._rows(one, torch.zeros_like(one.encoded.inputs["input_ids"]).bool(), none)

    def _features(self, batch: Sequence[Prepared]) -> tuple[Tensor, list[int]]:
        """(S, W) on the CPU: all slots of a batch, zeros where one was dropped. And how many each
        image has, where the model hands them out image by image; else nothing."""
        given = self.answerer.collate([one.encoded for one in batch])
        call = self.model.base_model.get_image_features
        known = inspect.signature(call).parameters
        arguments = {name: value for name, value in given.items() if name in known}
        if "pixel_values" not in given:
            return self.table.new_zeros(0, self.table.shape[1]), []
        arguments["pixel_values"] = given["pixel_values"]
        try:
            pooled = call(**arguments, return_dict=True).pooler_output
        except torch.OutOfMemoryError:
            raise ValueError(
                "the device's memory does not hold these images at once; use fewer or smaller ones"
            ) from None
        flat = flat_features(pooled).to("cpu", self.dtype)
        by_image = self.together and not isinstance(pooled, Tensor)
        return flat, [part.shape[:-1].numel() for part in pooled] if by_image else []

    def _rows(
        self, one: Prepared, places: Tensor, slots: Tensor, sizes: Sequence[int] = ()
    ) -> Rows:
        """One question's rows.

        Args:
            one: the question.
            places: (T,) bool: where its visual tokens stand.
            slots: (S,) what fills them; zeros: dropped.
            sizes: of each image, where the model told.
        """
        if len(slots) != int(places.sum()):
            raise ValueError("the model made another number of visual tokens than the prompt has")
        stays = ~places
        alive = (slots != 0).any(-1)
        stays[places] = alive
        run = _image_of(places, sizes)
        images = torch.bincount(run[alive], minlength=int(run.max()) + 1 if len(run) else 0)
        if self.together and bool((images == 0).any()):
            raise ValueError("nothing stays of an image at this keep; ask for more")
        ids = one.encoded.inputs["input_ids"]
        counts = tuple(int(n) for n in images)
        return Rows(one, ids[stays], places[stays], slots[alive], counts, len(slots))


def _image_of(places: Tensor, sizes: Sequence[int]) -> Tensor:
    """(S,) which image each slot belongs to.

    Args:
        places: (T,) bool: where they stand.
        sizes: slots of each image, which may stand side by side; none: behind each stands text.
    """
    if sizes:
        return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    begins = places & ~torch.cat([places.new_zeros(1), places[:-1]])
    return begins.cumsum(0)[places] - 1
