"""Turns: the order of every bench. First each variant is counted, then all are timed in turns.

Counting comes first since it calibrates, fixes what is kept and warms up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from itprune.bench.record import Progress
from itprune.bench.timing import interleave
from itprune.bench.variants import Variant

M = TypeVar("M")
Contra = TypeVar("Contra", contravariant=True)


class Bench(Protocol[Contra]):
    """What measures one variant."""

    def count(self, variant: Variant, into: Contra) -> None:
        """Notes what does not depend on the clock."""

    def time(self, variant: Variant, into: Contra) -> None:
        """Adds one lap of every time."""


def take_turns(
    bench: Bench[M],
    variants: Sequence[Variant],
    blank: Callable[[], M],
    repeats: int,
    progress: Progress,
) -> dict[str, M]:
    """Measures all variants in one interleaved run.

    Args:
        bench: measures.
        variants: the first one is what the others are compared with.
        blank: makes an empty record of one variant.
        repeats: timed rounds.
        progress: told what happens.

    Returns:
        The records by the variants' names, in their order.
    """
    measured = {variant.name: blank() for variant in variants}
    for variant in variants:
        progress(f"counting {variant.name}")
        bench.count(variant, measured[variant.name])
    for number, variant in enumerate(interleave(variants, repeats)):
        progress(f"round {number // len(variants) + 1} of {repeats}: {variant.name}")
        bench.time(variant, measured[variant.name])
    return measured
