"""Page: the looks at some questions as one HTML page, pictures and charts inside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean

from markupsafe import Markup
from PIL import Image

from itprune.comparing.scoring import is_right
from itprune.inspecting.charts import RULE_LOOK, Series, bars, score_curve, swatch
from itprune.inspecting.costs import LayerCost, mean_flops
from itprune.inspecting.looking import Grid, Look
from itprune.inspecting.rules import Curve
from itprune.inspecting.shading import shaded, viewable
from itprune.inspecting.words import joined
from itprune.pages import page, templates

MOST_GRIDS = 6
"""Grids drawn for a question: a picture may be cut into dozens of tiles."""
OPEN = 10
"""Questions whose details are open when the page is."""
BINS = 12
QUALITY = 88
DENSE, PRUNED, INSIDE = "--c7", "--c0", "--c3"
WritePicture = Callable[[str, Image.Image], None]


@dataclass(frozen=True)
class Figure:
    """One picture of the page."""

    source: str
    """A data address."""
    caption: str


@dataclass(frozen=True)
class Panel:
    """One grid as the page shows it."""

    name: str
    figures: tuple[Figure, ...]
    curve: Curve | None
    chart: Markup | None


@dataclass(frozen=True)
class Section:
    """One question as the page shows it."""

    look: Look
    """Without its pictures, which are drawn already."""
    panels: tuple[Panel, ...]
    hidden: int
    """Grids that are not drawn."""
    right: tuple[bool, bool] | None
    """Dense and pruned; None: the data has no answers."""


@dataclass(frozen=True)
class Header:
    """What the page says of the model."""

    model: str
    method: str
    about: str
    """The method in a line."""
    target: str
    device: str
    notes: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------ sections
def make_section(look: Look, number: int, write: WritePicture) -> Section:
    """Draws a question's pictures, as files and for the page.

    Args:
        look: at the question.
        number: from 1; in the names of the files.
        write: takes a file's name and its picture.
    """
    shown = look.grids[:MOST_GRIDS]
    panels = []
    for i, grid in enumerate(shown, 1):
        name = f"kept-{number:03d}" + (f"-grid{i}" if len(look.grids) > 1 else "")
        title = f"grid {i} of {len(look.grids)}" if len(look.grids) > 1 else ""
        panels.append(_panel(look, grid, name, title, write))
    right = None
    if look.label.references:
        dense, pruned = look.dense.answer, look.pruned.answer
        right = (is_right(dense, look.label.references), is_right(pruned, look.label.references))
    drawn = replace(look, grids=(), words=joined(look.words))
    return Section(drawn, tuple(panels), len(look.grids) - len(shown), right)


def _panel(look: Look, grid: Grid, name: str, title: str, write: WritePicture) -> Panel:
    place = grid.place
    total = place.rows * place.columns
    what = "as the encoder sees it" if place.seen else "as given"
    size = f"{place.rows} × {place.columns} tokens"
    figures = [_figure(viewable(place.picture), f"{name}.png", f"{what}: {size}", write)]
    for first, last in _spans(look):
        kept = grid.alive[first]
        caption = f"{_layers(first, last)}: {int(kept.sum())} of {total}"
        file = f"{name}-layer{first}.png"
        figures.append(_figure(shaded(place.picture, kept), file, caption, write))
    chart = None if grid.curve is None else score_curve(grid.curve, "Sorted scores")
    return Panel(title, tuple(figures), grid.curve, chart)


def _spans(look: Look) -> list[tuple[int, int]]:
    """First and last layer of each segment."""
    edges = (*look.starts, len(look.layer_tokens))
    return [(first, after - 1) for first, after in pairwise(edges)]


def _layers(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"layers {first}–{last}"


def _figure(picture: Image.Image, file: str, caption: str, write: WritePicture) -> Figure:
    """Writes the PNG; the page holds a JPEG, a tenth of its size for photographs."""
    write(file, picture)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    text = base64.b64encode(buffer.getvalue()).decode()
    return Figure(f"data:image/jpeg;base64,{text}", caption)


# ------------------------------------------------------------------------------------ the page
def make_page(header: Header, sections: Sequence[Section], costs: Sequence[LayerCost]) -> str:
    """The whole page.

    Args:
        header: of the model.
        sections: one a question, at least one.
        costs: of each LLM layer.
    """
    template = templates("itprune.inspecting").get_template("inspect.html")
    body = template.render(
        header=header,
        sections=sections,
        facts=_facts(sections, costs),
        charts=_charts(sections, costs),
        swatches={name: swatch(*look) for name, look in RULE_LOOK.items()},
        kept=swatch(PRUNED, ""),
        open=OPEN,
    )
    return page(f"What {header.method} kept", Markup(body))


def _facts(sections: Sequence[Section], costs: Sequence[LayerCost]) -> list[tuple[str, str]]:
    """Names and figures at the top."""
    looks = [section.look for section in sections]
    seeing = [look for look in looks if look.pruned.visual_in]
    facts = [("questions", str(len(looks)))]
    if seeing:
        steps = [
            fmean(look.pruned.visual_in for look in seeing),
            fmean(look.pruned.visual_stage1 for look in seeing),
            fmean(look.pruned.visual_stage2 for look in seeing),
        ]
        share = fmean(look.pruned.visual_layer_average or 0.0 for look in seeing)
        facts += [
            ("visual tokens → LLM → last layer", " → ".join(f"{step:.0f}" for step in steps)),
            ("kept, layer average", f"{share:.1%}"),
        ]
    pruned, dense = (sum(_flops(looks, costs, whole)) for whole in (False, True))
    facts.append(("LLM FLOPs of the prompt", f"{pruned / dense:.1%} of dense"))
    same = sum(look.pruned.answer == look.dense.answer for look in looks)
    facts.append(("same answer as dense", f"{same} of {len(looks)}"))
    marked = [section.right for section in sections if section.right is not None]
    if marked:
        right = [sum(both[i] for both in marked) for i in (0, 1)]
        facts.append(("right: dense, pruned", f"{right[0]}, {right[1]} of {len(marked)}"))
    return facts


def _flops(looks: Sequence[Look], costs: Sequence[LayerCost], dense: bool) -> list[float]:
    return mean_flops(costs, [_tokens(look, dense) for look in looks])


def _tokens(look: Look, dense: bool) -> Sequence[int]:
    """Tokens in each layer."""
    return [look.pruned.tokens_in] * len(look.layer_tokens) if dense else look.layer_tokens


def _charts(
    sections: Sequence[Section], costs: Sequence[LayerCost]
) -> list[tuple[str, list[Series], Markup]]:
    """Title, legend and drawing of the charts at the top."""
    looks = [section.look for section in sections]
    labels = [str(layer) for layer in range(len(costs))]
    seeing = [look for look in looks if look.pruned.visual_in]  # text alone keeps nothing
    charts = [_histogram(seeing)] if seeing else []
    tokens = [
        Series(name, [fmean(c) for c in zip(*(_tokens(x, d) for x in looks), strict=True)], colour)
        for name, d, colour in (("dense", True, DENSE), ("pruned", False, PRUNED))
    ]
    flops = [
        Series("dense", _flops(looks, costs, True), DENSE),
        Series("pruned", _flops(looks, costs, False), PRUNED),
    ]
    for title, series in (("Tokens in each layer", tokens), ("FLOPs of each layer", flops)):
        charts.append((f"{title}, mean", series, bars(series, labels, "LLM layer", title)))
    return charts


def _histogram(looks: Sequence[Look]) -> tuple[str, list[Series], Markup]:
    title = "Questions by visual tokens kept"
    most = max(look.pruned.visual_in for look in looks)
    width = -(-(most + 1) // BINS)
    count = most // width + 1
    series = [
        Series(
            "into the LLM", _binned([x.pruned.visual_stage1 for x in looks], width, count), PRUNED
        ),
        Series(
            "last layer", _binned([x.pruned.visual_stage2 for x in looks], width, count), INSIDE
        ),
    ]
    labels = [f"{i * width}" for i in range(count)]
    below = f"visual tokens, {width} a bin" if width > 1 else "visual tokens"
    return title, series, bars(series, labels, below, title)


def _binned(values: Sequence[int], width: int, count: int) -> list[int]:
    out = [0] * count
    for value in values:
        out[value // width] += 1
    return out


def figures(sections: Sequence[Section]) -> list[dict[str, object]]:
    """What inspect.json holds of the questions."""
    return [
        {
            "name": section.look.label.name,
            "question": section.look.label.text,
            "references": list(section.look.label.references),
            "visual_tokens": list(section.look.visual_counts),
            "segments": list(section.look.starts),
            "layer_tokens": list(section.look.layer_tokens),
            "dense": section.look.dense.to_dict(),
            "pruned": section.look.pruned.to_dict(),
        }
        for section in sections
    ]
