"""Rows become lines of a table: seeds joined, intervals, ratios to dense.

The interval is the bootstrap over samples; a sample's value is its mean over seeds. The difference
to dense is paired: both are drawn on the same samples.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from itprune.comparing.entries import CONTROLS, DENSE, Case
from itprune.comparing.rows import Row
from itprune.comparing.scoring import interval

FIELDS = {
    "method": "entry, as written on the command line",
    "keep": "target: fraction of visual tokens, averaged over the layers",
    "seeds": "runs with different seeds behind this line",
    "samples": "scored samples",
    "accuracy": "exact match, normalised",
    "low": "lower end of its 95 % bootstrap interval",
    "high": "upper end",
    "accuracy_ratio": "accuracy over dense's",
    "difference": "accuracy minus dense's",
    "difference_low": "lower end of its paired 95 % bootstrap interval",
    "difference_high": "upper end",
    "visual_llm": "visual tokens into the LLM, mean over samples with pictures",
    "visual_llm_ratio": "over dense's",
    "layer_average": "visual tokens kept, averaged over the LLM's layers",
    "kv_entries": "cached tokens after the prompt, summed over layers, mean over samples",
    "kv_ratio": "over dense's",
    "prefill_ms": "prefill of one batch, median",
    "prefill_speedup": "dense's over this, same timing session",
    "step_ms": "training step of one batch, median",
    "step_speedup": "dense's over this, same timing session",
    "session": "timing session",
    "reason": "why there are no figures",
}
Line = dict[str, Any]


def summarise(cases: Mapping[str, Case], rows: Mapping[str, Row]) -> list[Line]:
    """One line for each entry and budget: dense, then by budget the controls and the others.

    Args:
        cases: by key.
        rows: by key; must hold every case.
    """
    groups: dict[tuple[float, str], list[Row]] = {}
    for key, case in cases.items():
        groups.setdefault((case.keep, case.entry.label), []).append(rows[key])
    dense = next(row for (_, label), (row, *_) in groups.items() if label == DENSE)
    lines = [_line(label, keep, found, dense) for (keep, label), found in groups.items()]
    return sorted(lines, key=_place)


def _place(line: Line) -> tuple[Any, ...]:
    """Dense, then budgets upwards; in each the controls, then the best first."""
    name = line["method"]
    control = CONTROLS.index(name) if name in CONTROLS else len(CONTROLS)
    accuracy = line["accuracy"]
    return name != DENSE, line["keep"], control, accuracy is None, -(accuracy or 0.0)


def _line(label: str, keep: float, rows: Sequence[Row], dense: Row) -> Line:
    line: Line = dict.fromkeys(FIELDS)
    answered = [row["answers"] for row in rows if "answers" in row]
    line |= {"method": label, "keep": keep, "seeds": len(answered)}
    if not answered:
        return line | {"reason": rows[0]["reason"]}
    base = dense["answers"]
    line |= _accuracy([a["right"] for a in answered], base["right"])
    for name in ("visual_llm", "layer_average", "kv_entries"):
        line[name] = statistics.fmean(a[name] for a in answered)
    line["visual_llm_ratio"] = line["visual_llm"] / base["visual_llm"]
    line["kv_ratio"] = line["kv_entries"] / base["kv_entries"]
    timed: Row = next((row["time"] for row in rows if "time" in row), {})
    if "failed" in timed:
        line["reason"] = timed["failed"]
    elif timed:
        line["session"] = timed["session"]
        for name in ("prefill", "step"):
            line[f"{name}_ms"] = timed[f"{name}_ms"]
            line[f"{name}_speedup"] = timed["dense"][f"{name}_ms"] / timed[f"{name}_ms"]
    return line


def _accuracy(right: Sequence[str], dense: str) -> dict[str, Any]:
    values = [statistics.fmean(map(int, column)) for column in zip(*right, strict=True)]
    gaps = [v - int(d) for v, d in zip(values, dense, strict=True)]
    accuracy, base = statistics.fmean(values), statistics.fmean(map(int, dense))
    low, high = interval(values)
    gap_low, gap_high = interval(gaps)
    return {
        "samples": len(values),
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "accuracy_ratio": accuracy / base if base else None,
        "difference": accuracy - base,
        "difference_low": gap_low,
        "difference_high": gap_high,
    }
