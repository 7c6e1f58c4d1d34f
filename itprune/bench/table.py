"""Prints the record of a bench as a plain table (also valid Markdown)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Column = tuple[str, Callable[[Mapping[str, Any]], str]]

TRAIN: tuple[Column, ...] = (
    ("variant", lambda r: r["variant"]),
    ("step s", lambda r: f"{r['step_s']:.3g}"),
    ("forward / backward / optimizer", lambda r: _three(r)),
    ("speed-up", lambda r: f"{r['speedup']:.2f}x"),
    ("TFLOP", lambda r: f"{r['tflops']:.3g}"),
    ("FLOP ratio", lambda r: f"{r['flop_speedup']:.2f}x"),
    ("speed-up / FLOP ratio", lambda r: f"{r['of_flop_bound']:.2f}"),
    ("pairs seen", lambda r: f"{r['seen_flop_speedup']:.2f}x"),
    ("speed-up / pairs seen", lambda r: f"{r['of_seen_flop_bound']:.2f}"),
    ("peak MB", lambda r: f"{r['peak_mb']:,.0f}"),
    ("tokens a layer", lambda r: f"{r['tokens_layer_average']:.0f}"),
    ("choosing", lambda r: f"{r['selection_share']:.1%}"),
)

INFER: tuple[Column, ...] = (
    ("batch", lambda r: str(r["batch"])),
    ("variant", lambda r: r["variant"]),
    ("prefill s", lambda r: f"{r['prefill_s']:.3g}"),
    ("speed-up", lambda r: f"{r['prefill_speedup']:.2f}x"),
    ("FLOP ratio", lambda r: f"{r['prefill_flop_speedup']:.2f}x"),
    ("speed-up / FLOP ratio", lambda r: f"{r['prefill_of_flop_bound']:.2f}"),
    ("decode ms/token", lambda r: f"{r['decode_s'] * 1e3:.3g}"),
    ("decode speed-up", lambda r: f"{r['decode_speedup']:.2f}x"),
    ("decode FLOP ratio", lambda r: f"{r['decode_flop_speedup']:.2f}x"),
    ("KV MB", lambda r: f"{r['kv_mb']:.4g}"),
    ("without pads", lambda r: f"{r['kv_filled_mb']:.4g}"),
    ("as reported", lambda r: "yes" if r["kv_as_reported"] else "NO"),
)

METHODS: tuple[Column, ...] = (
    ("method", lambda r: r["variant"]),
    ("kept", lambda r: f"{r['visual_layer_average']:.3f}"),
    ("prefill s", lambda r: f"{r['prefill_s']:.3g}"),
    ("speed-up", lambda r: f"{r['speedup']:.2f}x"),
    ("FLOP ratio", lambda r: f"{r['flop_speedup']:.2f}x"),
    ("speed-up / FLOP ratio", lambda r: f"{r['of_flop_bound']:.2f}"),
    ("choosing ms", lambda r: f"{r['selection_s'] * 1e3:.1f}"),
    ("of the prefill", lambda r: f"{r['selection_share']:.1%}"),
    ("setting", lambda r: r["note"]),
)

EVAL: tuple[Column, ...] = (
    ("variant", lambda r: r["variant"]),
    ("kept", lambda r: f"{r['visual_layer_average']:.3f}"),
    ("batch s", lambda r: f"{r['seconds']:.3g}"),
    ("answers/s", lambda r: f"{r['answers_per_s']:.3g}"),
    ("speed-up", lambda r: f"{r['speedup']:.2f}x"),
    ("FLOP ratio", lambda r: f"{r['flop_speedup']:.2f}x"),
    ("speed-up / FLOP ratio", lambda r: f"{r['of_flop_bound']:.2f}"),
)

SERVE: tuple[Column, ...] = (
    ("variant", lambda r: r["variant"]),
    ("kept", lambda r: f"{r['visual_layer_average']:.3f}"),
    ("tokens in", lambda r: f"{r['tokens_in']:.0f}"),
    ("into the LLM", lambda r: f"{r['tokens_kept']:.0f}"),
    ("all s", lambda r: f"{r['seconds']:.3g}"),
    ("requests/s", lambda r: f"{r['requests_per_s']:.3g}"),
    ("speed-up", lambda r: f"{r['speedup']:.2f}x"),
    ("FLOP ratio", lambda r: f"{r['flop_speedup']:.2f}x"),
    ("speed-up / FLOP ratio", lambda r: f"{r['of_flop_bound']:.2f}"),
    ("FLOPs of padding", lambda r: f"{r['batched_flops'] - 1:.1%}"),
    ("first token p50 s", lambda r: f"{r['first_token_p50_s']:.3g}"),
    ("p95 s", lambda r: f"{r['first_token_p95_s']:.3g}"),
    ("KV MB", lambda r: f"{r['kv_mb']:.4g}"),
)

COLUMNS = {"train": TRAIN, "infer": INFER, "methods": METHODS, "eval": EVAL, "serve": SERVE}


def _three(row: Mapping[str, Any]) -> str:
    return " / ".join(f"{row[name]:.3g}" for name in ("forward_s", "backward_s", "optimizer_s"))


def render(record: Mapping[str, Any]) -> str:
    """The whole record as text: what was measured, then one line for each row."""
    return "\n".join([*_facts(record), "", *_table(COLUMNS[record["bench"]], record["rows"])])


def _facts(record: Mapping[str, Any]) -> list[str]:
    tokens, machine = record["tokens"], record["machine"]
    software = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        _crowd(record)
        if record["bench"] == "serve"
        else f"{record['bench']}: shape {record['shape']}, batch {record['batch']}, "
        f"{tokens['visual']} visual + {tokens['text']} text tokens "
        f"({tokens['supervised']} supervised), keep {record['keep']}",
        f"{machine['device']}, {machine['processor']}, {machine['threads']} thread(s); {software}",
        f"medians of {record['repeats']} interleaved rounds, {record['clock']}",
    ]
    if record["bench"] == "train":
        lines.append(
            f"step = forward + backward + AdamW on {record['parameters']['trained'] / 1e6:.1f} of "
            f"{record['parameters']['all'] / 1e6:.1f} M parameters; memory: {record['memory']}"
        )
    if record["bench"] == "eval":
        lines.append(
            f"{record['questions']} question(s) about each picture, {record['new_tokens']} new "
            "tokens an answer, by `generate`"
        )
    pruned = next((r for r in record["rows"] if r["variant"] == "pruned_packed"), None)
    if pruned is not None and "visual_stage1" in pruned:
        counts = " ".join(map(str, pruned["visual_stage1"]))
        lines.append(f"visual tokens kept of each image by pruned_packed: {counts}")
    return lines


def _crowd(record: Mapping[str, Any]) -> str:
    way = "the endpoint" if record["http"] else "its core"
    pictures = ", ".join(f"{count} with {n}" for n, count in record["pictures"].items())
    return (
        f"serve: shape {record['shape']}, {record['batch']} requests at once through {way} "
        f"(pictures: {pictures}), {record['new_tokens']} new tokens each, keep {record['keep']}"
    )


def _table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [[title for title, _ in columns]]
    cells += [[show(row) for _, show in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [_line(line, widths) for line in cells]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"
