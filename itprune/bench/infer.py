"""The inference bench: prefill and decoding of every variant at each batch size, in turns.

Prefill is the forward over the prompt that fills the cache; decoding feeds one token at a time.
What the cache holds is compared with what the report says it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from itprune.bench.counting import count_flops
from itprune.bench.record import MB, Progress, header, tokens_of
from itprune.bench.shape import Shape
from itprune.bench.shapes import build_model, find_shape, make_batch
from itprune.bench.timing import Clock, median, use_threads
from itprune.bench.turns import take_turns
from itprune.bench.variants import Variant, infer_variants
from itprune.engine.cache import PrunedLayer
from itprune.report import Report


@dataclass
class Measured:
    """What was counted and timed of one variant at one batch size."""

    prefill_flops: int = 0
    decode_flops: int = 0
    kv_bytes: int = 0
    kv_filled: int = 0
    report: Report | None = None
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


class InferBench:
    """Model and prompt shared by the variants."""

    def __init__(self, model: Any, shape: Shape, batch: int, threads: int, new: int) -> None:
        self.model, self.shape, self.new = model, shape, new
        self.prompt = make_batch(shape, batch, labels=False)
        self.clock = Clock(shape.device, threads)

    def prefill(self) -> Any:
        return self.model(**self.prompt, use_cache=True, logits_to_keep=1)

    def decode(self, out: Any, steps: int) -> None:
        """Greedy steps, without a mask: no row has padding, and `generate` leaves it out then."""
        for _ in range(steps):
            token = out.logits[:, -1:].argmax(-1)
            out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)

    def count(self, variant: Variant, into: Measured) -> None:
        """Calibrates, then counts FLOPs and the cache's bytes."""
        variant.calibrate(self.model, self.prompt)
        with variant.on(self.model) as attached:
            kept: list[Any] = []
            into.prefill_flops = count_flops(lambda: kept.append(self.prefill()))
            into.report = attached.report if attached is not None else None
            into.kv_bytes = cache_bytes(kept[0].past_key_values)
            into.kv_filled = cache_entries(kept[0].past_key_values)
            into.decode_flops = count_flops(lambda: self.decode(kept[0], 1))

    def time(self, variant: Variant, into: Measured) -> None:
        """One timed prefill and the decoding after it."""
        with variant.on(self.model):
            self.clock.restart()
            out = self.prefill()
            into.prefill.append(self.clock.lap())
            self.decode(out, self.new)
            into.decode.append(self.clock.lap() / self.new)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all keys and values a cache stores, alignment pads included."""
    parts = (part for layer in cache.layers for part in (layer.keys, layer.values))
    return sum(part.numel() * part.element_size() for part in parts)


def cache_entries(cache: Cache) -> int:
    """Tokens in a cache, summed over layers and rows, alignment pads not counted."""
    return sum(_entries(layer) for layer in cache.layers)


def _entries(layer: Any) -> int:
    if isinstance(layer, PrunedLayer):
        return int(layer.entries().sum())
    keys: Tensor = layer.keys
    return keys.shape[0] * keys.shape[2]


@torch.no_grad()
def bench_infer(
    shape: str = "cpu",
    batches: Sequence[int] | None = None,
    repeats: int = 5,
    keep: float = 0.22,
    threads: int = 1,
    new_tokens: int = 32,
    progress: Progress = lambda line: None,
) -> dict[str, Any]:
    """Measures prefill and decoding.

    Args:
        shape: a key of `SHAPES`.
        batches: batch sizes; None: one row, and the shape's number.
        repeats: timed rounds.
        keep: target average of the pruned variants.
        threads: CPU threads.
        new_tokens: tokens decoded in a round.
        progress: told what happens.

    Returns:
        A JSON-able record; `rows` has one entry for each variant and batch size.

    Raises:
        ValueError: unknown shape, or a machine too small for it.
    """
    size = find_shape(shape)
    batches = (1, size.batch) if batches is None else batches
    rows = []
    with use_threads(threads):
        model = build_model(size, training=False)
        for batch in batches:
            bench = InferBench(model, size, batch, threads, new_tokens)
            rows += _measure(bench, keep, repeats, batch, progress)
        head = header("infer", shape, list(batches), keep, repeats, bench.clock)
    return {**head, "new_tokens": new_tokens, "rows": rows}


def _measure(
    bench: InferBench, keep: float, repeats: int, batch: int, progress: Progress
) -> list[dict[str, Any]]:
    variants = infer_variants(bench.shape, keep)
    measured = take_turns(
        bench, variants, Measured, repeats, lambda line: progress(f"batch {batch}, {line}")
    )
    dense = measured[variants[0].name]
    return [_row(name, found, dense, bench.shape, batch) for name, found in measured.items()]


def _row(name: str, found: Measured, dense: Measured, shape: Shape, batch: int) -> dict[str, Any]:
    prefill, decode = median(found.prefill), median(found.decode)
    speedup, flop_speedup = (
        median(dense.prefill) / prefill,
        dense.prefill_flops / found.prefill_flops,
    )
    entries, stored = _reported_entries(found.report, shape, batch)
    entry = 2 * shape.kv_width * shape.dtype.itemsize  # one key and one value of one layer
    return {
        "variant": name,
        "batch": batch,
        "prefill_s": prefill,
        "prefill_speedup": speedup,
        "prefill_flop_speedup": flop_speedup,
        "prefill_of_flop_bound": speedup / flop_speedup,
        "decode_s": decode,
        "decode_speedup": median(dense.decode) / decode,
        "decode_flop_speedup": dense.decode_flops / found.decode_flops,
        "kv_mb": found.kv_bytes / MB,
        "kv_ratio": dense.kv_bytes / found.kv_bytes,
        "kv_filled_mb": found.kv_filled * entry / MB,
        "kv_as_reported": found.kv_filled == entries and found.kv_bytes == stored * entry,
        **tokens_of(found.report, shape, batch),
    }


def _reported_entries(report: Report | None, shape: Shape, batch: int) -> tuple[int, int]:
    """What the report says a cache holds: tokens, and tokens with the pads that align rows."""
    if report is None:
        full = batch * (shape.visual + shape.text) * shape.layers
        return full, full
    starts = [*report.drops, report.depth]
    stored = sum(
        (end - start) * batch * max(tokens)
        for (start, tokens), end in zip(report.drops.items(), starts[1:], strict=True)
    )
    return sum(report.kv_entries), stored
