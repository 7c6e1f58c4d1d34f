"""What the tests of the families compare with, and how closely."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from itprune import PromptFormat, PruneConfig, attach
from tests.family_models import (
    ASSISTANT,
    DEPTH,
    ROWS,
    VIDEO_FAMILIES,
    VIDEO_ROWS,
    build,
    placeholders,
)
from tests.oracle import masked

PROMPT = PromptFormat((0, 1, 2, *ASSISTANT), ASSISTANT)
STAGES: dict[str, dict[str, object]] = {
    "stage1": {"after": ()},
    "stage2": {"image": 1.3},
    "both": {},
}


def rounding(values: Tensor) -> float:
    """How far two float32 computations of the same values may be apart: 1e-5 at the size most
    families' logits have, 5. Gemma's and PaliGemma's are five times larger, as they scale what
    goes into the language model by the square root of its width, and rounding scales with them."""
    return 1e-5 * max(1.0, float(values.detach().abs().max()) / 5)


def hashed(stage: str = "both", **changes: object) -> PruneConfig:
    """A choice that looks at nothing."""
    return PruneConfig("hash_choice", keep=0.5, options=STAGES[stage], **changes)


def rows_of(name: str) -> tuple[tuple[int | str, ...], ...]:
    """All kinds of rows the family knows: several images, clips where it has them, text alone."""
    return ROWS if name not in VIDEO_FAMILIES else (*ROWS[:3], *VIDEO_ROWS)


@contextmanager
def attached(name: str, config: PruneConfig, train: bool = False) -> Iterator[tuple]:
    """A tiny model with a pruner; its trained parts made random but repeatable."""
    model = build(name).train(train)
    torch.manual_seed(0)
    with attach(model, config, prompt=PROMPT) as pruner:
        generator = torch.Generator().manual_seed(5)
        for weight in pruner.method.parameters():
            weight.data.add_(torch.randn(weight.shape, generator=generator) * 0.1)
        yield model, pruner


@contextmanager
def text_calls(model: nn.Module) -> Iterator[list[tuple[dict[str, Any], Tensor]]]:
    """Collects what the language model is called with by its host, and what it answers."""
    calls: list[tuple[dict[str, Any], Tensor]] = []
    asked: list[dict[str, Any]] = []
    text = model.get_decoder()

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        asked.append({**kwargs, "inputs_embeds": kwargs["inputs_embeds"].detach().clone()})

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((asked.pop(), output.last_hidden_state.detach()))

    handles = [
        text.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        text.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def masked_text(model: nn.Module, kwargs: dict[str, Any], drops: list[Tensor | None]) -> Tensor:
    """(B, S, W) the bare language model's answer to a host's call, dropped keys hidden."""
    call = {**kwargs, "past_key_values": None, "use_cache": False}
    with masked(model, drops), torch.no_grad():
        return model.get_decoder()(**call).last_hidden_state


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """The same gradients, up to 1e-5 of the largest."""
    assert a.keys() == b.keys()
    largest = max(1.0, *(float(g.abs().max()) for g in b.values()))
    for name in a:
        assert (a[name] - b[name]).abs().max() <= 1e-5 * largest, name


@contextmanager
def counted_rows(model: nn.Module) -> Iterator[list[int]]:
    """Counts the rows every decoder layer's feed-forward block runs on, forward after forward."""
    counts: list[int] = []

    def count(module: nn.Module, args: Any, output: Any) -> None:
        counts.append(args[0][..., 0].numel())

    handles = [layer.mlp.register_forward_hook(count) for layer in model.get_decoder().layers]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


PADDED = {"gemma3", "paligemma", "paligemma_2"}
"""Their masks say more than which tokens are padding, so that rows are padded to the longest."""


def computed(name: str, drops: dict[int, list[int]]) -> list[int]:
    """The rows each layer runs on, after what a report says it keeps of each sample."""
    starts = [max(start for start in drops if start <= layer) for layer in range(DEPTH)]
    lens = [drops[start] for start in starts]
    return [max(row) * len(row) if name in PADDED else sum(row) for row in lens]


def visual_counts(data: dict[str, Tensor]) -> list[int]:
    """Visual tokens of each row."""
    return placeholders(data).sum(1).tolist()
