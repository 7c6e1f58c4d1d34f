"""Counting: FLOPs, bytes kept for the backward pass, and the seconds a method takes to choose.

FLOPs are what torch's own counter says: two for each multiply-add of matrix products, convolutions
and attention, nothing for element-wise work. Its table has no entry for the attention kernel that
CPUs run, so one is added by the rule it uses for the CUDA kernels: every query-key pair counts,
masked or not. What of it belongs to pairs that no causal call needs is counted beside it: the
longer the sequence, the more of these a kernel leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from itprune.attach import Attached
from itprune.bench.timing import Clock

Dims = tuple[int, ...]


@dataclass
class Flops:
    """FLOPs of one run."""

    all: int = 0
    """By torch's rule."""
    unseen: int = 0
    """Of these, the attention from tokens to later ones in calls that are causal."""

    @property
    def seen(self) -> int:
        return self.all - self.unseen

    def attention(
        self,
        query: Dims,
        key: Dims,
        value: Dims,
        dropout: float = 0.0,
        causal: bool = False,
        **_: Any,
    ) -> int:
        """q k^T and the product with v. Shapes are (B, H, Lq, d), (B, H_kv, Lk, d),
        (B, H_kv, Lk, d_v); every query head works, whether it shares its keys or not."""
        return self._pairs(query, key, query[3] + value[3], causal)

    def attention_backward(
        self,
        grad: Dims,
        query: Dims,
        key: Dims,
        value: Dims,
        out: Dims,
        log_sum: Dims,
        dropout: float = 0.0,
        causal: bool = False,
        **_: Any,
    ) -> int:
        """Five products: q k^T again, and the gradients of the weights, v, q and k."""
        return self._pairs(query, key, 3 * query[3] + 2 * value[3], causal)

    def _pairs(self, query: Dims, key: Dims, width: int, causal: bool) -> int:
        samples, heads, queries, _ = query
        pairs = queries * key[2]
        if causal:
            later = sum(max(key[2] - 1 - i, 0) for i in range(queries))
            self.unseen += 2 * samples * heads * later * width
        return 2 * samples * heads * pairs * width


def count_flops(run: Callable[[], Any]) -> int:
    """Counted FLOPs of one call, by torch's rule."""
    return measure_flops(run).all


def measure_flops(run: Callable[[], Any]) -> Flops:
    """Counted FLOPs of one call."""
    flops = Flops()
    on_cpu = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flops.attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            flops.attention_backward
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        run()
    flops.all = int(counter.get_total_flops())
    return flops


class SavedBytes:
    """Context manager: memory that autograd keeps for the backward pass, each storage once.

    Parameters are there anyway and do not count.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._kept: dict[int, int] = {}
        self._hooks = saved_tensors_hooks(self._pack, lambda saved: saved)

    def _pack(self, saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._kept[storage.data_ptr()] = storage.nbytes()
        return saved

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    @property
    def total(self) -> int:
        return sum(self._kept.values())


class ChoiceTimer:
    """Seconds a method spent on its choices: scores, counts, ranking, relevance."""

    def __init__(self, clock: Clock) -> None:
        self.seconds, self._clock = 0.0, clock

    def wrap(self, choose: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begin = self._clock.now()
            try:
                return choose(*args)
            finally:
                self.seconds += self._clock.now() - begin

        return timed


@contextmanager
def timed_choices(attached: Attached | None, clock: Clock) -> Iterator[ChoiceTimer]:
    """Times `before_llm` and `after_layer` of an attached method while the block runs, and the q
    and k the engine computes for nothing but its scores (`Method.look_ahead`)."""
    timer = ChoiceTimer(clock)
    if attached is None:
        yield timer
        return
    method, engine = attached.method, attached._engine
    first, later, ahead = method.before_llm, method.after_layer, engine.query_key
    method.before_llm = timer.wrap(first)  # type: ignore[method-assign]
    method.after_layer = timer.wrap(later)  # type: ignore[method-assign]
    engine.query_key = timer.wrap(ahead)  # type: ignore[method-assign]
    try:
        yield timer
    finally:
        del method.before_llm, method.after_layer, engine.query_key
