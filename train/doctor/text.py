"""The findings of `itprune doctor CONFIG` in words."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from train.doctor.examine import Findings
from train.doctor.forecast import Kept, Spread, Survey
from train.doctor.memory import Memory
from train.doctor.room import Batches, Disk

WIDTH = 100
LABEL = 10
GB = 1 << 30
MB = 1 << 20
SHOWN = 400
"""Characters of the supervised text."""


def describe(found: Findings) -> Iterator[str]:
    """All of it, line by line."""
    yield from _row("recipe", f"{found.recipe}: mode {found.mode}, {found.model}")
    if found.family:
        yield from _row(
            "model",
            f"family {found.family}; {found.trained:,} of {found.weights:,} weights train",
        )
    if found.data is not None:
        yield from _data(found.data)
    for kept in found.budgets:
        yield from _row("kept", _kept(kept))
    if found.batches is not None:
        yield from _row("batches", _batches(found.batches, found.processes))
    if found.memory is not None:
        yield from _memory(found.memory, found)
    if found.disk is not None:
        yield from _row("disk", _disk(found.disk))
    if found.checkpoint is not None:
        yield from _row("resume", f"the run would go on from {found.checkpoint}")
    for sentence in found.warnings:
        yield from _row("warning", sentence)
    for sentence in found.problems:
        yield from _row("problem", sentence)
    yield from _row("verdict", "the run would start" if found.starts else "the run would not start")


def _data(data: Survey) -> Iterator[str]:
    total = f"of {data.total:,} samples " if data.total else "from the beginning "
    bad = sum(data.bad.values())
    yield from _row("data", f"{data.asked} {total}examined, {bad} cannot be used")
    for reason, count in data.bad.items():
        yield from _row("", f"{reason}: {count}, the first: {data.examples[reason]}")
    for name in ("text", "visual", "supervised"):
        spread = Spread.of([vars(size)[name] for size in data.sizes])
        yield from _row(
            "lengths" if name == "text" else "",
            f"{name:10} tokens: least {spread.least}, median {spread.median}, 95 % up to "
            f"{spread.p95}, most {spread.most}",
        )
    if data.learnt:
        text = data.learnt[:SHOWN] + ("…" if len(data.learnt) > SHOWN else "")
        yield from _row("learnt", f"of {data.learnt_at}, and nothing else of it:")
        for line in text.splitlines():
            yield from _row("", f"| {line}")


def _kept(kept: Kept) -> str:
    if kept.keep is None:
        return "as the method's rule decides; nothing can be told before it runs"
    share = kept.average / kept.dense if kept.dense else 1.0
    return (
        f"at keep {kept.keep:g}: {kept.enters:.0f} of {kept.dense:.0f} tokens of a sample enter "
        f"the LLM, {kept.average:.0f} on average over its layers ({share:.0%})"
    )


def _batches(batches: Batches, processes: int) -> str:
    epoch = f"{batches.steps_per_epoch:,} steps an epoch, " if batches.steps_per_epoch else ""
    return (
        f"{batches.samples:.4g} samples and about {batches.tokens:,} kept tokens a batch on "
        f"{processes} process(es), up to {batches.largest.tokens:,}; {epoch}{batches.steps:,} steps"
    )


def _memory(memory: Memory, found: Findings) -> Iterator[str]:
    has = f" of {_size(found.device_memory)}" if found.device_memory else ""
    yield from _row(
        "memory", f"about {_size(memory.total)}{has} a process ({found.device}), estimated:"
    )
    parts = {name: size for name, size in memory.to_dict().items() if name != "total" and size}
    yield from _row("", ", ".join(f"{name} {_size(size)}" for name, size in parts.items()))


def _disk(disk: Disk) -> str:
    return (
        f"up to {disk.checkpoints} checkpoint(s) of {_size(disk.checkpoint)} and "
        f"{_size(disk.final)} at the end; {_size(disk.free)} free"
    )


def _size(size: int) -> str:
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / MB:.1f} MB"


def _row(name: str, text: str) -> Iterator[str]:
    return iter(
        textwrap.wrap(
            f"{name:{LABEL}}{text}",
            WIDTH,
            subsequent_indent=" " * LABEL,
            break_long_words=False,
            break_on_hyphens=False,
            drop_whitespace=True,
        )
        or [""]
    )
