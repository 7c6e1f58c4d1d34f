"""What of a dialogue a KV cache knows already, and whether it can take the rest.

Legend: T tokens of the whole dialogue, image tokens included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from itprune.attach import Attached
from itprune.inputs import PER_TOKEN

REWRITTEN = "the chat template writes earlier turns anew"
RELAID = "the processor lays earlier images out anew"
FORGOTTEN = "the model's sliding window has passed over what is needed"
SPARED = "the method spares compute on visual tokens, which it must meet in one forward"


@dataclass(frozen=True)
class Visual:
    """Visual tokens of a cache's prompts: how many, and how far they went."""

    given: int = 0
    stage1: int = 0
    """Into the LLM."""
    stage2: int = 0
    """To its last layer."""
    layers: int = 0
    """Summed over the LLM's layers."""

    def __add__(self, other: Visual) -> Visual:
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return Visual(*(a + b for a, b in pairs))


@dataclass(frozen=True)
class Held:
    """A cache and what it was made from."""

    cache: Cache
    ids: Sequence[int]
    """What it has seen, token by token."""
    prompt: int
    """Tokens before the last answer."""
    inputs: Mapping[str, Tensor]
    """Of the last prompt: (T,) inputs of tokens, and those of all its images."""
    visual: Visual


@dataclass(frozen=True)
class Plan:
    """What one turn is to run."""

    inputs: Mapping[str, Tensor]
    """(T,) inputs of tokens, and those of the images the cache does not know."""
    held: Held | None = None
    """None: everything is run."""
    start: int = 0
    """Tokens the cache knows."""
    why: str = ""
    """Why the cache is not continued."""


def plan_turn(inputs: Mapping[str, Tensor], held: Held, attached: Attached | None) -> Plan:
    """Goes on behind the tokens a cache has in common with a dialogue.

    Where the dialogue spells the last answer otherwise than the model did, that much is cropped
    off the cache.

    Args:
        inputs: of the whole dialogue.
        held: the cache; cropped where the plan uses it.
        attached: the pruner at work.
    """
    same = _common(inputs["input_ids"].tolist(), held.ids)
    if same < held.prompt:
        return Plan(inputs, why=REWRITTEN)
    images = _added(inputs, held.inputs)
    if images is None:
        return Plan(inputs, why=RELAID)
    surplus = len(held.ids) - same
    why = _refusal(held.cache, bool(images), surplus, attached)
    if why:
        return Plan(inputs, why=why)
    if surplus:
        held.cache.crop(-surplus)
    tokens = {key: value for key, value in inputs.items() if key in PER_TOKEN}
    return Plan({**tokens, **images}, held, same)


def _refusal(cache: Cache, images: bool, surplus: int, attached: Attached | None) -> str:
    """Why a cache cannot go on; empty: it can.

    Args:
        cache: the cache.
        images: whether there are new ones.
        surplus: tokens at its end that the dialogue does not have.
        attached: the pruner at work.
    """
    sliding = [x for x in cache.layers if isinstance(x, DynamicSlidingWindowLayer)]
    if surplus and any(x.get_seq_length() >= x.sliding_window for x in sliding):
        return FORGOTTEN
    if not images or attached is None or attached.method.idle:
        return ""
    if sliding:
        return FORGOTTEN
    method = attached.method
    return SPARED if any(method.sparsity(layer) for layer in range(method.depth)) else ""


def _common(ids: Sequence[int], other: Sequence[int]) -> int:
    """Tokens at the start that both have."""
    pairs = enumerate(zip(ids, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(other)))


def _added(now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Inputs of the images that came behind those of `before`; None: these have changed, too.

    Some processors look at all images of a dialogue together: a lone picture is cut into tiles,
    two are not.
    """
    new: dict[str, Tensor] = {}
    for key in now.keys() - PER_TOKEN.keys():
        value, old = now[key], before.get(key)
        if old is None:
            new[key] = value
            continue
        grown = [axis for axis, size in enumerate(old.shape) if size != value.shape[axis]]
        axis = grown[0] if grown else 0
        size = min(old.shape[axis], value.shape[axis])
        if len(grown) > 1 or not torch.equal(value.narrow(axis, 0, size), old):
            return None
        if grown:
            new[key] = value.narrow(axis, size, value.shape[axis] - size)
    return new
