"""The numeric oracle: the unpruned model with dropped keys masked out, layer by layer.

Independent of the engine: it shares nothing with it but the list of what was dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from itprune.methods import register_method
from itprune.methods.base import Method
from itprune.tokens import Images, Kept, LayerTokens


@dataclass(frozen=True)
class HashOptions:
    image: float = 0.6
    """Share of visual tokens into the LLM; varies by image."""
    visual: float = 0.5
    """Share of the visual tokens alive after each layer in `after`."""
    text: float = 0.8
    after: tuple[int, ...] = (1, 3)


@register_method("hash_choice")
class HashChoice(Method):
    """A pseudo-random, content-free choice at any stages: exercises the engine, not a rule."""

    Options = HashOptions
    places = ("before_llm", "layers")

    def layers(self) -> tuple[int, ...]:
        return self.options.after

    def before_llm(self, images: Images) -> Kept:
        index = (
            torch.arange(len(images.image)) - (images.lens.cumsum(0) - images.lens)[images.image]
        )
        share = self.options.image - 0.2 * (images.fingerprint % 2)[images.image]
        return Kept(_hash(index, 1) < share)

    def after_layer(self, tokens: LayerTokens) -> Kept:
        first = torch.searchsorted(tokens.sample, tokens.sample)
        index = torch.arange(len(tokens.sample)) - first
        share = torch.where(tokens.visual, self.options.visual, self.options.text)
        droppable = tokens.visual | tokens.droppable_text
        return Kept((_hash(index, tokens.layer + 2) < share) | ~droppable)


def _hash(index: Tensor, salt: int) -> Tensor:
    return ((index * 2654435761 + salt * 97) % 1009) / 1009


def dropped_by_layer(context_rows: list, samples: int, length: int) -> list[Tensor | None]:
    """What each layer ran without: (B, S) bool, True = dropped; None = the host's layout."""
    out: list[Tensor | None] = []
    for rows in context_rows:
        gone = None
        if rows is not None:
            gone = torch.ones(samples * length, dtype=torch.bool)
            gone[rows.token] = False
            gone = gone.view(samples, length)
        out.append(gone)
    return out


@contextlib.contextmanager
def masked(model: torch.nn.Module, drops: list[Tensor | None]) -> Iterator[None]:
    """Layer i of the bare model cannot see keys in drops[i] (new tokens after them are seen)."""
    handles = []
    for gone, layer in zip(drops, model.get_decoder().layers, strict=True):
        if gone is None:
            continue

        def hide(module, args, kwargs, gone=gone):
            samples, length = args[0].shape[:2]
            hidden = F.pad(gone, (0, length - gone.shape[1]))[:, None, None]
            mask = kwargs["attention_mask"]
            if mask is None:
                mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            mask = mask.expand(samples, 1, -1, -1)
            if mask.dtype == torch.bool:
                mask = mask & ~hidden
            else:  # added to the scores
                mask = mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
            return args, {**kwargs, "attention_mask": mask}

        handles.append(layer.register_forward_pre_hook(hide, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def recorded_rows(model: torch.nn.Module) -> Iterator[dict[str, list]]:
    """Collects the rows every layer ran on, from the context that travels with the call."""
    found: dict[str, list] = {}

    def look(module, args, kwargs, output):
        carried = kwargs.get("itprune_context")
        if carried is not None and carried.context.method is not None:
            context = carried.context
            found["rows"] = list(context.rows_at)
            found["shape"] = tuple(context.sequence.valid.shape)

    handle = model.get_decoder().register_forward_hook(look, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def drops_of(found: dict[str, list]) -> list[Tensor | None]:
    return dropped_by_layer(found["rows"], *found["shape"])
