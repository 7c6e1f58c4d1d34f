"""The quickstart's own arithmetic; the whole of it runs in `make quickstart`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from itprune.trace import Trace
from train.pictures import draw_curves, stage_masks
from train.quickstart import Run, main, row, table

VAL = [
    {"id": "a", "kind": "x", "conversations": [{"from": "gpt", "value": "7"}]},
    {"id": "b", "kind": "y", "conversations": [{"from": "gpt", "value": "red"}]},
]


def test_a_row_counts_exact_matches(tmp_path: Path) -> None:
    said = [
        {"id": "a", "answer": " 7", "visual_layer_average": 0.2},
        {"id": "b", "answer": "blue", "visual_layer_average": 0.3},
    ]
    (tmp_path / "said.jsonl").write_text("\n".join(map(json.dumps, said)))
    log = {"log_history": [{"step_time": 0.2}, {"step_time": 0.4}, {"step_time": 0.3}]}
    (tmp_path / "log.json").write_text(json.dumps(log))
    found = row(Run("r", "m", tmp_path / "log.json", tmp_path / "said.jsonl"), VAL)
    assert found["accuracy"] == 0.5
    assert found["by_kind"] == {"x": 1.0, "y": 0.0}
    assert found["kept"] == pytest.approx(0.25)
    assert found["step_s"] == 0.3
    bare = row(Run("r", "m", None, tmp_path / "said.jsonl"), VAL)
    tuned = [{**found, "run": "tuned dense", "step_s": 0.6}, {**found, "run": "tuned pruned"}]
    text = table([bare, *tuned, bare], 0.1)
    assert "50.0%" in text
    assert "2.00 times" in text


def test_pictures_show_the_traced_stages(tmp_path: Path) -> None:
    visual = torch.tensor([[False, True, True, True, True]])
    alive = {0: visual.clone(), 2: torch.tensor([[False, False, True, False, False]])}
    masks = stage_masks(Trace(visual=visual, alive=alive))
    assert [mask.tolist() for mask, _ in masks] == [[True] * 4, [False, True, False, False]]
    log = [{"step": s, "loss": 1 / s, "layer_average": 0.3, "step_time": 0.1} for s in (1, 2, 3)]
    draw_curves({"tuned pruned": log}, tmp_path / "p" / "curves.png")
    pixels = np.asarray(Image.open(tmp_path / "p" / "curves.png"))
    assert pixels.shape[0] > 100
    assert pixels.std() > 5


def test_it_says_where_to_run(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "root folder" in capsys.readouterr().err
