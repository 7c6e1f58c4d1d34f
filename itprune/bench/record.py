"""The record of a bench: what was measured, on what, with what software."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import itprune
from itprune.bench.shape import Shape
from itprune.bench.shapes import SHAPES
from itprune.bench.timing import Clock
from itprune.report import Report

MB = 1e6
Progress = Callable[[str], None]
"""Told in a few words what is being measured."""


def header(
    bench: str, shape: str, batch: Any, keep: float, repeats: int, clock: Clock
) -> dict[str, Any]:
    """Everything about a run but its numbers."""
    size = SHAPES[shape]
    return {
        "bench": bench,
        "shape": shape,
        "batch": batch,
        "keep": keep,
        "repeats": repeats,
        "tokens": {"visual": size.visual, "text": size.text, "supervised": size.supervised},
        "clock": clock.unit,
        "machine": machine(clock),
        "versions": versions(),
    }


def tokens_of(report: Report | None, shape: Shape, batch: int) -> dict[str, Any]:
    """Tokens of a row, averaged over the batch; without a report nothing was dropped."""
    full = shape.visual + shape.text
    if report is None:
        return {
            "tokens_in": full,
            "tokens_llm": full,
            "tokens_layer_average": full,
            "visual_layer_average": 1.0,
            "visual_stage1": [shape.visual] * batch,
        }
    return {
        "tokens_in": sum(report.tokens_in) / batch,
        "tokens_llm": sum(report.tokens_stage1) / batch,
        "tokens_layer_average": sum(report.kv_entries) / batch / report.depth,
        "visual_layer_average": report.visual_layer_average,
        "visual_stage1": report.visual_stage1,
    }


def machine(clock: Clock) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "device": torch.cuda.get_device_name() if clock.device.type == "cuda" else "cpu",
        "processor": _processor(),
        "system": platform.platform(),
        "threads": clock.threads,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({len(names)} cores)" if names else name


def versions() -> dict[str, str]:
    """The software they were measured with."""
    return {
        "itprune": itprune.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
    }
