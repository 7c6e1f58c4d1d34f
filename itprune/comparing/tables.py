"""A comparison as files: compare.csv and compare.json hold everything, compare.md what is read."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from itprune.comparing.summary import FIELDS, Line
from itprune.writing import replace_text

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
    replace_text(folder / "compare.json", json.dumps(record, indent=1) + "\n")
    with (folder / "compare.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(lines)
    text = "\n".join([*_facts(head, lines), "", *markdown(lines)]) + "\n"
    replace_text(folder / "compare.md", text)
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
    return aligned(cells)


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table of cells, the first row its head; a row that says why it is empty does not
    widen the columns."""
    widths = [
        max(len(row[i]) for row in cells if NONE not in row or i < 2) for i in range(len(cells[0]))
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


def number(name: str, form: str, scale: float = 1.0) -> Callable[[Line], str]:
    """Shows a field in a format, times `scale`; a dash where it is None."""

    def show(line: Line) -> str:
        value = line[name]
        return NONE if value is None else format(value * scale, form)

    return show


def with_ratio(name: str, ratio: str, unit: str) -> Callable[[Line], str]:
    """Shows a field, and in brackets the field of its ratio to dense, where there is one."""

    def show(line: Line) -> str:
        value = line[name]
        if value is None:
            return NONE
        short = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        return short if line[ratio] is None else f"{short} ({line[ratio]:.2f}{unit})"

    return show


def span(low: str, high: str, form: str, scale: float = 100.0) -> Callable[[Line], str]:
    """Shows two fields as the ends of an interval."""

    def show(line: Line) -> str:
        if line[low] is None:
            return NONE
        return f"{scale * line[low]:{form}} to {scale * line[high]:{form}}"

    return show


COLUMNS: tuple[Column, ...] = (
    ("method", lambda line: f"`{line['method']}`"),
    ("keep", number("keep", ".2f")),
    ("exact match", number("accuracy", ".1f", 100)),
    ("95 % interval", span("low", "high", ".1f")),
    ("to dense", number("difference", "+.1f", 100)),
    ("its 95 % interval", span("difference_low", "difference_high", "+.1f")),
    ("visual tokens", with_ratio("visual_llm", "visual_llm_ratio", "")),
    ("layer average", number("layer_average", ".3f")),
    ("KV entries", with_ratio("kv_entries", "kv_ratio", "")),
    ("prefill ms", with_ratio("prefill_ms", "prefill_speedup", "x")),
    ("step ms", with_ratio("step_ms", "step_speedup", "x")),
)
