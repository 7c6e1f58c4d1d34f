"""A comparison as files: compare.csv and compare.json hold everything, compare.md what is read."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from itprune.comparing.summary import FIELDS, Line

Column = tuple[str, Callable[[Line], str]]
NONE = "–"


def write_tables(folder: Path, head: Mapping[str, Any], lines: Sequence[Line]) -> str:
    """Writes the three files.

    Args:
        folder: where to.
        head: what was compared, on what.
        lines: from `summarise`.

    Returns:
        The Markdown.
    """
    record = {**head, "fields": FIELDS, "rows": list(lines)}
    (folder / "compare.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    with (folder / "compare.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(lines)
    text = "\n".join([*_facts(head, lines), "", *markdown(lines)]) + "\n"
    (folder / "compare.md").write_text(text, encoding="utf-8")
    return text


def markdown(lines: Sequence[Line]) -> list[str]:
    """The table, aligned; columns nobody filled are left out."""
    columns = [c for c in COLUMNS if any(c[1](line) != NONE for line in lines)]
    cells = [[title for title, _ in columns]]
    for line in lines:
        row = [show(line) for _, show in columns]
        if line["accuracy"] is None:
            row[2:] = [line["reason"].removeprefix("prune.keep: ")] + [NONE] * (len(columns) - 3)
        cells.append(row)
    widths = [
        max(len(row[i]) for row in cells if NONE not in row or i < 2) for i in range(len(columns))
    ]
    ruled = [cells[0], ["-" * width for width in widths], *cells[1:]]
    return [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in ruled
    ]


def _facts(head: Mapping[str, Any], lines: Sequence[Line]) -> list[str]:
    machine, timing = head["machine"], head["timing"]
    samples = next(line["samples"] for line in lines if line["samples"])
    software = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    facts = [
        f"Model {head['model']}, data {head['data']}: {samples} samples scored, "
        f"{head['calibration']} others to calibrate on. Exact match with its 95 % bootstrap "
        "interval; differences to dense are paired. In brackets: tokens as a share of dense's, "
        "times as a speed-up over dense.",
        "",
        f"{machine['device']}, {machine['processor']}; {software}.",
    ]
    if timing is not None:
        sessions = {line["session"] for line in lines if line["session"] is not None}
        several = f" {len(sessions)} runs, each with its own dense." if len(sessions) > 1 else ""
        facts[-1] += (
            f" Times are medians of {timing['rounds']} rounds, all cases in turns, of a batch of "
            f"{timing['batch_size']}, {timing['clock']}.{several}"
        )
    return facts


def _of(name: str, form: str, scale: float = 1.0) -> Callable[[Line], str]:
    def show(line: Line) -> str:
        value = line[name]
        return NONE if value is None else format(value * scale, form)

    return show


def _both(name: str, ratio: str, unit: str) -> Callable[[Line], str]:
    def show(line: Line) -> str:
        value = line[name]
        if value is None:
            return NONE
        short = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        return f"{short} ({line[ratio]:.2f}{unit})"

    return show


def _interval(low: str, high: str, form: str) -> Callable[[Line], str]:
    def show(line: Line) -> str:
        if line[low] is None:
            return NONE
        return f"{100 * line[low]:{form}} to {100 * line[high]:{form}}"

    return show


COLUMNS: tuple[Column, ...] = (
    ("method", lambda line: f"`{line['method']}`"),
    ("keep", _of("keep", ".2f")),
    ("exact match", _of("accuracy", ".1f", 100)),
    ("95 % interval", _interval("low", "high", ".1f")),
    ("to dense", _of("difference", "+.1f", 100)),
    ("its 95 % interval", _interval("difference_low", "difference_high", "+.1f")),
    ("visual tokens", _both("visual_llm", "visual_llm_ratio", "")),
    ("layer average", _of("layer_average", ".3f")),
    ("KV entries", _both("kv_entries", "kv_ratio", "")),
    ("prefill ms", _both("prefill_ms", "prefill_speedup", "x")),
    ("step ms", _both("step_ms", "step_speedup", "x")),
)
