"""Answers become lines of a table: seeds joined, intervals, differences and ratios to dense.

A line stands for a method at a budget. Its headline figure is the task's; where a method has a
seed, all figures are means over the seeds, and intervals are over questions, not over seeds.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from itprune.comparing.entries import CONTROLS, DENSE, Case
from itprune.comparing.scoring import bounds
from itprune.evaluating.answers import Record
from itprune.evaluating.bootstrap import Draws, Scores
from itprune.tasks.base import Item, Task

FIELDS = {
    "method": "entry, as written on the command line",
    "keep": "target: fraction of visual tokens, averaged over the layers",
    "seeds": "runs with different seeds behind this line",
    "items": "questions that count",
    "value": "the headline figure, which the run's `metric` names; a share is between 0 and 1",
    "low": "lower end of its 95 % bootstrap interval",
    "high": "upper end",
    "ratio": "value over dense's",
    "difference": "value minus dense's",
    "difference_low": "lower end of its paired 95 % bootstrap interval",
    "difference_high": "upper end",
    "visual_llm": "visual tokens into the LLM, mean over questions with pictures",
    "visual_llm_ratio": "over dense's",
    "layer_average": "visual tokens kept, averaged over the LLM's layers",
    "kv_entries": "cached tokens after the prompt, summed over layers, mean over questions",
    "kv_ratio": "over dense's",
    "kv_bytes": "their keys and values",
    "tokens_out": "tokens of an answer, mean",
    "answers_per_s": "answers of one process in a second, median over batches; preparing pictures "
    "is left out",
    "timing": "how answers_per_s was measured",
    "speedup": "answers_per_s over dense's, where both were measured alike",
    "figures": "all totals of the task",
    "kinds": "kind of question -> questions, value, difference to dense's",
    "reason": "why there are no figures",
}
COSTS = ("visual_llm", "layer_average", "kv_entries", "kv_bytes", "tokens_out", "answers_per_s")
Line = dict[str, Any]


@dataclass(frozen=True)
class Answered:
    """A case and how it answered, or the reason why it did not."""

    case: Case
    costs: Mapping[str, float] = field(default_factory=dict)
    """From `costs_of`."""
    timing: str = ""
    """From `timing_of`."""
    scores: Scores = ()
    """One for each question that counts, in their order."""
    reason: str = ""


@dataclass(frozen=True)
class Measured:
    """The figures of a method at a budget, seeds joined."""

    figures: dict[str, float]
    kinds: dict[str, float]
    costs: dict[str, float]
    timing: str
    drawn: Tensor
    seeds: int


def summarise(task: Task, items: Sequence[Item], answered: Sequence[Answered]) -> list[Line]:
    """One line for each method and budget: dense, then by budget the controls and the others.

    Args:
        task: totals scores.
        items: the questions that count.
        answered: every case; dense is among them.
    """
    draws = Draws(task, items)
    groups: dict[tuple[float, str], list[Answered]] = {}
    for one in answered:
        groups.setdefault((one.case.keep, one.case.entry.label), []).append(one)
    dense = _measure(draws, groups[1.0, DENSE])
    lines = []
    for (keep, label), found in groups.items():
        line: Line = dict.fromkeys(FIELDS)
        line |= {"method": label, "keep": keep, "seeds": 0}
        done = [one for one in found if not one.reason]
        if done:
            measured = dense if label == DENSE else _measure(draws, done)
            line |= _line(draws, measured, dense)
        else:
            line["reason"] = found[0].reason
        lines.append(line)
    return sorted(lines, key=place)


def place(line: Line) -> tuple[Any, ...]:
    """Dense, then budgets upwards; in each the controls, then the best first."""
    name, value = line["method"], line["value"]
    control = CONTROLS.index(name) if name in CONTROLS else len(CONTROLS)
    return name != DENSE, line["keep"], control, value is None, -(value or 0.0), name


def _measure(draws: Draws, found: Sequence[Answered]) -> Measured:
    task, items = draws.task, draws.items
    totals = [task.total(items, one.scores) for one in found]
    kinds: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        if item.kind:
            kinds.setdefault(item.kind, []).append(index)
    return Measured(
        figures=_means(totals),
        kinds={kind: _of_kind(draws, found, chosen) for kind, chosen in sorted(kinds.items())},
        costs=_means([one.costs for one in found]),
        timing=found[0].timing,
        drawn=torch.stack([draws.figures(one.scores) for one in found]).mean(0),
        seeds=len(found),
    )


def _of_kind(draws: Draws, found: Sequence[Answered], chosen: Sequence[int]) -> float:
    """The headline figure of some of the questions."""
    task, items = draws.task, [draws.items[i] for i in chosen]
    totals = [task.total(items, [one.scores[i] for i in chosen]) for one in found]
    return statistics.fmean(total[task.metric] for total in totals)


def costs_of(records: Sequence[Record]) -> dict[str, float]:
    """Tokens, cache and answers per second of a case; visual figures where pictures were shown.

    Args:
        records: of the questions that count.
    """
    seeing = [r for r in records if r["visual_in"]]
    usual = timing_of(records)
    seconds = statistics.median(r["seconds"] for r in records if _timing(r) == usual)
    costs = {
        "kv_entries": statistics.fmean(r["kv_entries"] for r in records),
        "kv_bytes": statistics.fmean(r["kv_bytes"] for r in records),
        "tokens_out": statistics.fmean(r["tokens_out"] for r in records),
    }
    if seconds:
        costs["answers_per_s"] = 1 / seconds
    if seeing:
        costs["visual_llm"] = statistics.fmean(r["visual_llm"] for r in seeing)
        costs["layer_average"] = statistics.fmean(r["layer_average"] for r in seeing)
    return costs


def timing_of(records: Sequence[Record]) -> str:
    """How most of the answers were timed: a run that goes on may have another clock or batch."""
    return Counter(_timing(record) for record in records).most_common(1)[0][0]


def _timing(record: Record) -> str:
    return f"{record['clock']}, batches of {record['batch']}"


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of every figure, over seeds."""
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}


def _line(draws: Draws, found: Measured, dense: Measured) -> Line:
    metric, items = draws.task.metric, draws.items
    value, base = found.figures[metric], dense.figures[metric]
    low, high = bounds(found.drawn)
    gap_low, gap_high = bounds(found.drawn - dense.drawn)
    counts = Counter(item.kind for item in items)
    return {
        "seeds": found.seeds,
        "items": len(items),
        "value": value,
        "low": low,
        "high": high,
        "ratio": value / base if base else None,
        "difference": value - base,
        "difference_low": gap_low,
        "difference_high": gap_high,
        **{name: found.costs.get(name) for name in COSTS},
        "visual_llm_ratio": _ratio(found, dense, "visual_llm"),
        "kv_ratio": _ratio(found, dense, "kv_entries"),
        "timing": found.timing,
        "speedup": _ratio(found, dense, "answers_per_s") if found.timing == dense.timing else None,
        "figures": found.figures,
        "kinds": {
            kind: {"items": counts[kind], "value": own, "difference": own - dense.kinds[kind]}
            for kind, own in found.kinds.items()
        },
    }


def _ratio(found: Measured, dense: Measured, name: str) -> float | None:
    own, base = found.costs.get(name), dense.costs.get(name)
    return own / base if own is not None and base else None
