"""Every cell of the matrix: one curve and one result, whoever starts the run and however often it
is killed, and no rank waits for another for ever.

In all of them one rank has only text while the other has only images, in turn.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from itprune import checkpoint
from tests.distributed.conftest import Runs
from tests.distributed.matrix import CELLS, LAUNCHERS, Cell, table
from tests.distributed.starting import ROOT
from tests.train.helpers import losses

TOLERANCE = 1e-4
WEIGHTS = 1e-5
pytestmark = pytest.mark.xdist_group("dist")


def weights(folder: Path) -> dict[str, Tensor]:
    """All trained weights of a saved folder, under one set of names."""
    saved = {path.name: path for path in folder.glob("*.safetensors")}
    found = {}
    if "pruner.safetensors" in saved:
        parts = load_file(saved.pop("pruner.safetensors"))
        found = {f"pruner.{name}": value for name, value in parts.items()}
    if "adapter_model.safetensors" in saved:
        return found | load_file(saved["adapter_model.safetensors"])
    return found | dict(checkpoint.load_pretrained(folder).model.state_dict())


def evaluations(output: Path) -> list[float]:
    state = json.loads((output / "trainer_state.json").read_text())
    return [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("cell", [c for c in CELLS if not c.refused], ids=lambda c: c.name)
def test_cell(cell: Cell, runs: Runs) -> None:
    done = runs(cell.kind)[cell.name]
    assert done.status == ("0",) * cell.processes, "\n".join(text[-2000:] for text in done.said)
    told = done.said[0]
    assert LAUNCHERS[cell.launcher].says in told
    assert f"{cell.processes} process(es) on cpu" in told
    alone = runs("python")[f"{cell.mode}-python-1"]
    assert losses(done.output) == pytest.approx(losses(alone.output), abs=TOLERANCE)
    assert evaluations(done.output) == pytest.approx(evaluations(alone.output), abs=TOLERANCE)
    ours, expected = weights(done.output), weights(alone.output)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, atol=WEIGHTS, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [c.name for c in CELLS if c.mode == "lora" and c.processes == 2])
def test_a_killed_run_went_on(name: str, runs: Runs) -> None:
    cell = next(c for c in CELLS if c.name == name)
    found = runs(cell.kind)
    assert "killed" in found[f"{name}-killed"].status
    assert "going on from" in found[name].said[0]


@pytest.mark.slow
@pytest.mark.parametrize("cell", [c for c in CELLS if c.refused], ids=lambda c: c.name)
def test_refused(cell: Cell, runs: Runs) -> None:
    done = runs(cell.kind)[cell.name]
    assert done.status == ("2",) * cell.processes
    assert f"error: {cell.refused}" in done.said[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_dropped_tokens_change_no_byte_of_what_ranks_exchange(name: str, runs: Runs) -> None:
    found = runs({"zero3": "deepspeed 2"}.get(name, f"{name} 2"))
    whole, few = (found[f"bytes-{name}-{keep}"] for keep in (1.0, 0.2))
    assert whole.status == few.status == ("0", "0"), whole.said[0][-2000:] + few.said[0][-2000:]
    assert losses(whole.output) != losses(few.output)
    assert sum(whole.sent[0].values()) > 100_000
    assert whole.sent == few.sent


def test_the_document_has_the_table_and_the_table_its_tests() -> None:
    assert table() in (ROOT / "docs/training.md").read_text()
    collected = [
        cell
        for test in (test_cell, test_refused)
        for mark in test.pytestmark
        if mark.name == "parametrize"
        for cell in mark.args[1]
    ]
    assert sorted(c.name for c in collected) == sorted(c.name for c in CELLS)
