"""The table of `train.compare`: training-free and tuned side by side, means over the seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from itprune.comparing.data import read_parts
from itprune.comparing.entries import CONTROLS, DENSE
from train.scenes import majority_accuracy

NONE = "–"
SHORT = {
    "needs training": "needs training",
    "out of reach": "out of reach",
    "lowest reachable": "out of reach",
    "is less than": "out of reach",
    "not run": "not run",
    "the tuning failed": "the tuning failed",
}
"""What a reason says -> what the table does; table.json has the sentence."""
UNKNOWN = "refused"
SCORED_BESIDE = 64
"""Samples `itprune compare` sets aside by default."""
Line = dict[str, Any]


def merge(out: Path, seeds: Sequence[int], keeps: Sequence[float], tuned: Sequence[str]) -> Line:
    """Everything under a folder of `train.compare`.

    Args:
        out: the folder.
        seeds: of tuning.
        keeps: budgets.
        tuned: entries that were tuned.

    Returns:
        `lines`, and `majority`: the exact match of always giving the most frequent answer.
    """
    train, val = (json.loads((out / "data" / f"{s}.json").read_text()) for s in ("train", "val"))
    scored = [s.record for s in read_parts(out / "data" / "val.json", None, SCORED_BESIDE).scored]
    kinds = [str(record["kind"]) for record in scored]
    free = [json.loads((out / f"free-{seed}" / "compare.json").read_text()) for seed in seeds]
    names = dict.fromkeys((row["method"], row["keep"]) for row in free[0]["rows"])
    names |= dict.fromkeys((name, keep) for keep in keeps for name in tuned if name != DENSE)
    lines = []
    for name, keep in names:
        found = [_free_row(record["rows"], name, keep) for record in free]
        scores = [_tuned(out, name, keep, seed) for seed in seeds] if name in tuned else []
        lines.append(_line(name, keep, found, scores, kinds))
    majority = majority_accuracy(train, val)
    return {
        "lines": sorted(lines, key=_place),
        "seeds": list(seeds),
        "samples": len(scored),
        "majority": statistics.fmean(majority[kind] for kind in kinds),
        "machine": free[0]["machine"],
        "versions": free[0]["versions"],
        "timing": free[0]["timing"],
    }


def _free_row(rows: Sequence[Line], name: str, keep: float) -> Line:
    missing = {"accuracy": None, "reason": None}
    same = (row for row in rows if row["method"] == name and row["keep"] == keep)
    return next(same, missing)


def _tuned(out: Path, name: str, keep: float, seed: int) -> Line:
    """The score of one tuned checkpoint, or why there is none."""
    folder = out / "tuned" / f"{name}-{keep:g}-{seed}"
    rows = folder / "score" / "rows.jsonl"
    if rows.exists():
        found = [json.loads(line) for line in rows.read_text().splitlines()]
        return next(row for row in reversed(found) if row["method"] == name)
    log = folder.with_name(f"{folder.name}.log")
    if not log.exists():
        return {"reason": "not run"}
    lines = log.read_text(encoding="utf-8").splitlines()
    told = [line for line in lines if line.startswith("error: ")]
    return {"reason": told[-1].removeprefix("error: ") if told else "the tuning failed"}


def _line(
    name: str, keep: float, free: Sequence[Line], tuned: Sequence[Line], kinds: Sequence[str]
) -> Line:
    line: Line = {"method": name, "keep": keep, "free": _free(free), "tuned": _score(tuned, kinds)}
    shown = free[0] if free[0]["accuracy"] is not None else _tokens(tuned)
    for field in ("visual_llm", "layer_average", "kv_entries", "prefill_speedup", "step_speedup"):
        line[field] = shown.get(field)
    return line


def _free(rows: Sequence[Line]) -> Line | None:
    if any(row["accuracy"] is None for row in rows):
        return {"reason": rows[0]["reason"]} if rows[0]["reason"] else None
    gaps = [row["difference"] for row in rows]
    return {**_spread([row["accuracy"] for row in rows]), "difference": statistics.fmean(gaps)}


def _score(rows: Sequence[Line], kinds: Sequence[str]) -> Line | None:
    if not rows:
        return None
    scored = [row for row in rows if "answers" in row]
    if not scored:
        return {"reason": rows[0]["reason"]}
    right = [[int(digit) for digit in row["answers"]["right"]] for row in scored]
    by_kind = {
        kind: statistics.fmean(
            r for digits in right for r, k in zip(digits, kinds, strict=True) if k == kind
        )
        for kind in sorted(set(kinds))
    }
    kept = statistics.fmean(row["answers"]["layer_average"] for row in scored)
    found = {"by_kind": by_kind, "kept": kept, "missing": len(rows) - len(scored)}
    return {**_spread([statistics.fmean(r) for r in right]), **found}


def _tokens(rows: Sequence[Line]) -> Line:
    """Figures of a method that only runs tuned."""
    if not rows or "answers" not in rows[0]:
        return {}
    time = rows[0].get("time", {})
    speed = {
        f"{name}_speedup": time["dense"][f"{name}_ms"] / time[f"{name}_ms"]
        for name in ("prefill", "step")
        if f"{name}_ms" in time
    }
    return {**rows[0]["answers"], **speed}


def _spread(values: Sequence[float]) -> Line:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"accuracy": statistics.fmean(values), "spread": deviation, "each": list(values)}


def _place(line: Line) -> tuple[Any, ...]:
    """Dense, then budgets upwards; in each the controls, then the best training-free first."""
    name = line["method"]
    control = CONTROLS.index(name) if name in CONTROLS else len(CONTROLS)
    best = [(line[part] or {}).get("accuracy", -1.0) for part in ("free", "tuned")]
    return name != DENSE, line["keep"], control, -best[0], -best[1]


# ------------------------------------------------------------------------------------ Markdown
def render(record: Line) -> str:
    """The table as Markdown, with what stands behind it."""
    seeds, timing = len(record["seeds"]), record["timing"]
    head = (
        f"Exact match on {record['samples']} held-out scenes, mean and standard deviation over "
        f"{seeds} seed(s) of tuning. Always giving the most frequent answer scores "
        f"{100 * record['majority']:.1f}."
    )
    if timing is not None:
        head += (
            f" Speed-ups over dense: medians of {timing['rounds']} rounds, all in turns, of a "
            f"batch of {timing['batch_size']}, {timing['clock']}, {record['machine']['processor']}."
        )
    titles = ["method", "keep", "training-free", "to dense", "tuned", "visual tokens"]
    titles += ["layer average", "KV entries", "prefill", "training step"]
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    shown = [line for line in record["lines"] if _has_figure(line)]
    rows += [f"| {' | '.join(_cells(line))} |" for line in shown]
    return "\n".join([head, "", *rows, "", *_left_out(record["lines"])])


def _has_figure(line: Line) -> bool:
    return any("accuracy" in (line[part] or {}) for part in ("free", "tuned"))


def _left_out(lines: Sequence[Line]) -> list[str]:
    """What has no figure at a budget, and why, one item a budget."""
    found: dict[float, list[str]] = {}
    for line in lines:
        if not _has_figure(line):
            told = [_accuracy(line[part]) for part in ("free", "tuned") if line[part] is not None]
            why = ", ".join(dict.fromkeys(told))
            found.setdefault(line["keep"], []).append(f"`{line['method']}` ({why})")
    return [f"- No figure at {keep:.2f}: {', '.join(names)}." for keep, names in found.items()]


def _cells(line: Line) -> list[str]:
    free = line["free"] or {}
    gap = free.get("difference")
    return [
        f"`{line['method']}`",
        f"{line['keep']:.2f}",
        _accuracy(line["free"]),
        NONE if gap is None else f"{100 * gap:+.1f}",
        _accuracy(line["tuned"]),
        _number(line["visual_llm"], ".0f"),
        _number(line["layer_average"], ".3f"),
        _number(line["kv_entries"], ".0f"),
        _number(line["prefill_speedup"], ".2f", "x"),
        _number(line["step_speedup"], ".2f", "x"),
    ]


def _accuracy(found: Line | None) -> str:
    if found is None:
        return NONE
    if "reason" in found:
        return next((short for sign, short in SHORT.items() if sign in found["reason"]), UNKNOWN)
    accuracy, seeds = f"{100 * found['accuracy']:.1f}", len(found["each"])
    spread = f" ± {100 * found['spread']:.1f}" if seeds > 1 else ""
    return accuracy + spread + (f" ({seeds} seed(s))" if found.get("missing") else "")


def _number(value: float | None, form: str, unit: str = "") -> str:
    return NONE if value is None else f"{value:{form}}{unit}"
