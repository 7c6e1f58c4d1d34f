"""The page of a report: one self-contained document."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from itprune.pages import page, templates
from itprune.reporting.charts import charts
from itprune.reporting.differences import Differences
from itprune.reporting.recorded import Training
from itprune.reporting.scored import Score, Scores
from itprune.reporting.summary import Summary, accuracies, keep, method

NONE = "–"
ENDED_BADLY = ("failed", "lost")
SHORT = 8
"""Letters of a commit."""


@dataclass(frozen=True)
class Cell:
    """What a table says in one place; `wrong` stands out."""

    text: str
    wrong: bool = False


def render(summary: Summary, title: str = "Runs compared") -> str:
    """The report as one HTML document.

    Args:
        summary: what it tells.
        title: of the page.
    """
    body = (
        templates("itprune.reporting")
        .get_template("report.html")
        .render(
            title=title,
            names=list(summary.runs),
            facts=facts(summary),
            charts=charts(summary),
            tables=[
                ("What differs between the recipes", _cells(summary.recipe)),
                ("What differs between software and machines", _cells(summary.surroundings)),
            ],
            files=summary.files,
            scores=[
                (name, one, [_score(one, score) for score in one.scores])
                for name, found in summary.scores.items()
                for one in found
            ],
        )
    )
    return page(title, Markup(body))


def facts(summary: Summary) -> list[tuple[str, list[Cell]]]:
    """The table of runs: a name, and a cell for each run; rows nobody fills are left out."""
    runs = list(summary.runs.values())
    found = {"outcome": [Cell(_outcome(run), run.state in ENDED_BADLY) for run in runs]}
    found |= {name: [Cell(show(run) or NONE) for run in runs] for name, show in FACTS.items()}
    found["training data"] = _data(summary)
    return [(name, cells) for name, cells in found.items() if any(c.text != NONE for c in cells)]


def _data(summary: Summary) -> list[Cell]:
    """Fingerprints of the training data, those that are not the first run's marked."""
    names = list(summary.runs)
    first = next(((n, p) for n, p in zip(names, summary.prints, strict=True) if p), None)
    found = []
    for mark in summary.prints:
        if mark is None or first is None:
            found.append(Cell(NONE))
        elif mark == first[1]:
            found.append(Cell(mark))
        else:
            found.append(Cell(f"⚠ {mark}, other data than {first[0]}", wrong=True))
    return found


def _cells(found: Differences) -> list[tuple[str, list[str]]]:
    return [
        (key, [NONE if value is None else value for value in values])
        for key, values in found.items()
    ]


def _score(one: Scores, score: Score) -> Sequence[str]:
    """Method, keep, value, interval, tokens."""
    scale = 100.0 if one.share else 1.0
    value = NONE if score.value is None else f"{scale * score.value:.1f}"
    known = score.low is not None and score.high is not None
    span = f"{scale * (score.low or 0):.1f} to {scale * (score.high or 0):.1f}" if known else NONE
    tokens = NONE if score.tokens is None else f"{score.tokens:.3f}"
    return score.method, NONE if score.keep is None else f"{score.keep:g}", value, span, tokens


# ------------------------------------------------------------------------------- facts of a run
def _outcome(run: Training) -> str:
    if run.state == "unknown":
        return NONE
    if run.state == "running":
        return f"running, or killed: last heard of {_time(run.seen)}"
    return run.state + (f": {run.sentence.partition('; ')[0]}" if run.sentence else "")


def _steps(run: Training) -> str | None:
    if run.step is None:
        return None
    return f"{run.step:,}" + (f" of {run.steps:,}" if run.steps else "")


def _time(text: str | None) -> str | None:
    return None if text is None else text[:16].replace("T", " ") + " UTC"


def _loss(found: Mapping[str, float] | None) -> str | None:
    return None if found is None else f"{found['last']:.4f} (best {found['best']:.4f})"


def _accuracy(run: Training) -> str:
    rows = [(row["keep"] or 0.0, row["accuracy"] or 0.0) for row in accuracies(run)]
    return "\n".join(f"{100 * accuracy:.1f} % at keep {at:g}" for at, accuracy in rows)


def _commit(run: Training) -> str | None:
    if run.commit is None:
        return None
    return run.commit[:SHORT] + (", changed since" if run.dirty else "")


def _samples(run: Training) -> str | None:
    count = run.samples.get("train")
    return None if count is None else f"{count:,}"


def _number(name: str, form: str, unit: str) -> Callable[[Training], str | None]:
    def show(run: Training) -> str | None:
        value = run.metrics[name]
        return None if value is None else f"{value:{form}} {unit}".strip()

    return show


def _around(*names: str) -> Callable[[Training], str | None]:
    def show(run: Training) -> str | None:
        found = [run.surroundings[name] for name in names if name in run.surroundings]
        return ", ".join(found) or None

    return show


FACTS: Mapping[str, Callable[[Training], Any]] = {
    "method": method,
    "keep": lambda run: "all tokens" if method(run) == "dense" else keep(run),
    "steps": _steps,
    "attempts": lambda run: None if run.attempts is None else str(run.attempts),
    "last loss": lambda run: _loss(run.metrics["loss"]),
    "evaluation loss": lambda run: _loss(run.metrics["eval"].get("loss")),
    "accuracy": _accuracy,
    "step time, median": _number("step_time_s", ".3g", "s"),
    "tokens per second": _number("tokens_per_s", ",.0f", ""),
    "largest memory": _number("peak_mb", ",.0f", "MB"),
    "training samples": _samples,
    "commit": _commit,
    "device": _around("machine.device"),
    "launcher": _around("launcher"),
    "processes": _around("processes"),
    "started": lambda run: _time(run.started),
    "ended": lambda run: _time(run.ended),
}
"""Rows of the table of runs, but outcome and data."""
