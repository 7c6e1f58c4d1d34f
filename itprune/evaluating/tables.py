"""The runs of a folder as files: eval.json and eval.csv hold everything, eval.md what is read."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from itprune.comparing.entries import DENSE
from itprune.comparing.tables import NONE, Column, aligned, number, span, with_ratio
from itprune.evaluating.runs import Run
from itprune.evaluating.summary import FIELDS, Line
from itprune.writing import replace_text

HEAD = {
    "run": "fingerprint of model, data and settings; answers/TASK-RUN holds the answers",
    "task": "the benchmark",
    "metric": "its headline figure",
    "share": "whether that is a share, else points",
    "model": "the checkpoint",
    "data": "the files",
    "options": "of the task",
    "items": "questions that count",
    "bad": "questions left out, each with the reason",
    "calibration": "others that methods are calibrated on",
    "draws": "of the bootstrap",
    "batch_size": "questions answered together",
    "rows": "one for each method and budget, see `fields`",
}
SHOWN_BAD = 5
"""Questions left out that the Markdown names; the JSON names all."""
NESTED = ("figures", "kinds")


def write_tables(folder: Path, runs: Sequence[Run]) -> None:
    """Writes the three files.

    Args:
        folder: where to.
        runs: all that lie there.
    """
    record = {"runs_fields": HEAD, "fields": FIELDS, "runs": [run.to_dict() for run in runs]}
    replace_text(folder / "eval.json", json.dumps(record, indent=1) + "\n")
    _write_csv(folder / "eval.csv", runs)
    text = "\n\n".join("\n".join(section(run)) for run in runs) + "\n"
    replace_text(folder / "eval.md", text)


def _write_csv(path: Path, runs: Sequence[Run]) -> None:
    """A row for each line, and one for each kind of question in it."""
    plain = [name for name in FIELDS if name not in NESTED]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["task", "model", "run", "metric", "kind", *plain])
        writer.writeheader()
        for run in runs:
            common = {name: run.head[name] for name in ("task", "model", "run", "metric")}
            for line in run.lines:
                writer.writerow({**common, **{name: line[name] for name in plain}})
                who = {name: line[name] for name in ("method", "keep", "seeds")}
                for kind, found in (line["kinds"] or {}).items():
                    writer.writerow({**common, **who, "kind": kind, **found})


# ---------------------------------------------------------------------------------- Markdown
def section(run: Run) -> Iterator[str]:
    """A run in Markdown, line by line."""
    yield f"## {run.head['task']}: {run.head['model']}"
    yield ""
    yield _facts(run)
    yield ""
    yield from _table(run.lines, _columns(run), reasons=True)
    further = [name for name in _names(run, "figures") if name != run.head["metric"]]
    if further:
        yield from ("", "All figures:", "")
        yield from _table(run.lines, [*_WHO, *(_figure(name) for name in further)], False)
    kinds = _names(run, "kinds")
    if kinds:
        yield from ("", f"By kind of question ({run.unit}; in brackets the difference to dense):")
        yield ""
        yield from _table(run.lines, [*_WHO, *(_kind(run, name) for name in kinds)], False)
    yield from _bad(run.head["bad"])


def _facts(run: Run) -> str:
    head = run.head
    timings = "; ".join(dict.fromkeys(line["timing"] for line in run.lines if line["timing"]))
    software = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    return (
        f"Data {', '.join(head['data'])}: {head['items']} questions count, {head['calibration']} "
        f"others to calibrate on. The interval is the 95 % bootstrap's ({head['draws']} draws), "
        "differences to dense are paired. In brackets: tokens as a share of dense's, answers per "
        f"second over dense's ({timings}). "
        f"{head['machine']['device']}, {head['machine']['processor']}; {software}."
    )


def _bad(bad: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if bad:
        yield ""
        yield f"{len(bad)} question(s) could not be read and do not count:"
        yield ""
        yield from (f"- {_cell(one['error'])}" for one in bad[:SHOWN_BAD])
        if len(bad) > SHOWN_BAD:
            yield "- …"


def _table(lines: Sequence[Line], columns: Sequence[Column], reasons: bool) -> Iterator[str]:
    """Lines in columns; those without figures say why, or are left out."""
    cells = [[title for title, _ in columns]]
    for line in lines:
        if line["value"] is not None:
            cells.append([show(line) for _, show in columns])
        elif reasons:
            who = [show(line) for _, show in _WHO]
            reason = _cell(line["reason"].removeprefix("prune.keep: "))
            cells.append([*who, reason, *[NONE] * (len(columns) - len(who) - 1)])
    yield from aligned(cells)


def _columns(run: Run) -> list[Column]:
    scale = run.scale
    return [
        *_WHO,
        (run.unit, number("value", ".1f", scale)),
        ("95 % interval", span("low", "high", ".1f", scale)),
        ("to dense", number("difference", "+.1f", scale)),
        ("its 95 % interval", span("difference_low", "difference_high", "+.1f", scale)),
        ("visual tokens", with_ratio("visual_llm", "visual_llm_ratio", "")),
        ("layer average", number("layer_average", ".3f")),
        ("KV entries", with_ratio("kv_entries", "kv_ratio", "")),
        ("answers/s", with_ratio("answers_per_s", "speedup", "x")),
    ]


def _names(run: Run, field: str) -> list[str]:
    """Keys of a nested field, in dense's order."""
    dense = next(line for line in run.lines if line["method"] == DENSE)
    return list(dense[field] or {})


def _figure(name: str) -> Column:
    def show(line: Line) -> str:
        value = line["figures"].get(name)
        return NONE if value is None else f"{value:.4g}"

    return _cell(name), show


def _kind(run: Run, name: str) -> Column:
    def show(line: Line) -> str:
        found = line["kinds"].get(name)
        if found is None:
            return NONE
        return f"{run.scale * found['value']:.1f} ({run.scale * found['difference']:+.1f})"

    dense = next(line for line in run.lines if line["method"] == DENSE)
    return f"{_cell(name)} ({dense['kinds'][name]['items']})", show


def _cell(text: str) -> str:
    """Text of the data inside a table: one line, and no column of its own."""
    return " ".join(text.split()).replace("|", "\\|")


_WHO: tuple[Column, ...] = (
    ("method", lambda line: f"`{_cell(line['method'])}`"),
    ("keep", number("keep", ".2f")),
)
