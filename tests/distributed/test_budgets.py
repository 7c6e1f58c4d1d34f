"""Budgets drawn anew each step, lessons and evaluations at several budgets, shared by two ranks.

In every step one rank has only text while the other has only images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import Runs
from tests.train.helpers import history

TOLERANCE = 1e-4
pytestmark = pytest.mark.xdist_group("dist")


def evaluations(output: Path) -> list[dict[str, float]]:
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    names = ("loss", "accuracy")
    found = [entry for entry in log if "eval_loss" in entry]
    return [{k: v for k, v in e.items() if any(n in k for n in names)} for e in found]


def column(steps: list[dict[str, Any]], name: str) -> list[float | None]:
    return [step.get(name) for step in steps]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [("ddp 2", "parts-ddp"), ("fsdp2 2", "parts-fsdp2"), ("deepspeed 2", "plain-zero3")],
)
def test_ranks_draw_learn_and_evaluate_alike(kind: str, name: str, runs: Runs) -> None:
    done = runs(kind)[f"drawn-{name}"]
    assert done.status == ("0", "0"), "\n".join(text[-2000:] for text in done.said)
    alone = runs("python")[f"drawn-{name.partition('-')[0]}-python"]
    steps, expected = history(done.output), history(alone.output)
    assert column(steps, "keep") == column(expected, "keep")
    assert column(steps, "keep")[1] == 1.0
    assert column(steps, "loss") == pytest.approx(column(expected, "loss"), abs=TOLERANCE)
    assert [step for step, seen in enumerate(steps) if "distill" in seen] == [3]
    assert steps[3]["distill"] == pytest.approx(expected[3]["distill"], rel=1e-2, abs=1e-6)
    found, wanted = evaluations(done.output), evaluations(alone.output)
    assert len(found) == 2
    for ours, theirs in zip(found, wanted, strict=True):
        assert len(ours) == 6
        assert ours == pytest.approx(theirs, abs=TOLERANCE)
