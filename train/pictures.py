"""Pictures of a run: which patches stayed, where the curve bends, how training went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from itprune import Loaded, load_pretrained
from itprune.inspecting.looking import Looker
from itprune.inspecting.shading import faded
from itprune.question import Question
from itprune.trace import Trace

KEPT_1, KEPT_2, GREY = "#E69F00", "#0072B2", "#666666"
"""Colours that stay apart for colour-blind readers (Okabe and Ito)."""
LINES = (GREY, KEPT_2, KEPT_1)


def draw_kept(model: str, images: Sequence[Path], prompts: Sequence[str], out: Path) -> None:
    """One column an image: the picture, the patches kept by each stage, the sorted curve.

    Args:
        model: checkpoint folder with a pruner.
        images: picture files.
        prompts: the question asked of each.
        out: the PNG to write.
    """
    loaded = load_pretrained(model)
    figure = Figure(figsize=(2.6 * len(images), 10.5), layout="constrained")
    axes = figure.subplots(4, len(images), squeeze=False)
    for column, (path, prompt) in enumerate(zip(images, prompts, strict=True)):
        picture = Image.open(path).convert("RGB")
        question = prompt.replace("<image>", "").strip()
        trace = trace_one(loaded, picture, question)
        axes[0, column].imshow(picture)
        axes[0, column].set_title(question, fontsize=8)
        for stage, (mask, name) in enumerate(stage_masks(trace), start=1):
            shade(axes[stage, column], picture, mask)
            axes[stage, column].set_title(f"{name}: {int(mask.sum())} of {len(mask)}", fontsize=8)
        draw_score_curve(axes[3, column], trace)
        for axis in axes[:3, column]:
            axis.set_axis_off()
    axes[3, 0].set_ylabel("attention of CLS")
    save(figure, out)


def trace_one(loaded: Loaded, picture: Image.Image, question: str) -> Trace:
    """Runs one question through the prompt and returns the pruner's choices."""
    looker = Looker(loaded, max_new_tokens=1)
    return looker.trace(looker.answerer.encode(Question.from_prompt(question, [picture])))


def stage_masks(trace: Trace) -> list[tuple[np.ndarray, str]]:
    """(V,) masks of the visual tokens alive after stage 1 and at the end, with names."""
    assert trace.visual is not None
    alive = [trace.alive[layer] for layer in sorted(trace.alive)]
    second = f"stage 2 (layers {max(trace.alive)}+)" if len(alive) > 1 else "stage 2, no more drops"
    names = ["stage 1", second]
    picked = [alive[0], alive[-1]]
    return [(a[trace.visual].numpy(), n) for a, n in zip(picked, names, strict=True)]


def shade(axis: Any, picture: Image.Image, mask: np.ndarray) -> None:
    """The picture with dropped patches greyed out."""
    side = int(len(mask) ** 0.5)
    axis.imshow(faded(picture, mask.reshape(side, side), paper=235, share=0.12))


def draw_score_curve(axis: Any, trace: Trace) -> None:
    """The sorted scores, their mean, and where the kept ones end."""
    assert trace.score is not None
    assert trace.keep is not None
    score = trace.score.sort(descending=True).values.numpy()
    kept, bend = int(trace.keep.sum()), int((trace.score > trace.score.mean()).sum())
    axis.plot(score, color=KEPT_2)
    axis.axhline(score.mean(), color=GREY, linewidth=0.8, linestyle=":")
    axis.axvline(bend, color=GREY, linewidth=0.8, linestyle="--", label=f"bend: {bend}")
    axis.axvline(kept, color=KEPT_1, label=f"kept: {kept}")
    axis.fill_between(range(kept), score[:kept], color=KEPT_1, alpha=0.3)
    axis.legend(fontsize=7, frameon=False)
    axis.set_xlabel("patches, best first", fontsize=8)
    axis.tick_params(labelsize=7)


def draw_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]], out: Path) -> None:
    """Loss, kept tokens and step time of several runs over their steps."""
    wanted = {
        "loss": "training loss",
        "layer_average": "share of all tokens, layer average",
        "step_time": "seconds a step",
    }
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    axes = figure.subplots(1, len(wanted))
    for axis, (key, title) in zip(axes, wanted.items(), strict=True):
        for (name, log), colour in zip(logs.items(), LINES, strict=False):
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            axis.plot(*zip(*points, strict=True), label=name, color=colour, marker=".")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    save(figure, out)


def save(figure: Figure, out: Path) -> None:
    """Writes a PNG, folder included."""
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
