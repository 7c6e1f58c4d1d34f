"""A small benchmark on the bundled model: twelve pictures, two questions each.

The right answers are what the dense model says (`data`), so that no test hangs on its skill.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from itprune import PromptFormat, PruneConfig, attach, load_pretrained, save_pretrained
from itprune.answer import Answerer
from itprune.cli import eval as command
from itprune.decoding import Decoding
from itprune.question import Question, open_image

MODEL = Path(__file__).resolve().parents[2] / "assets" / "tiny-llava"
PROMPTS = {"colour": "What colour is the 1?", "count": "How many digits are there?"}
SMALL = ("--batch-size", "4", "--max-new-tokens", "4", "--seeds", "0", "--device", "cpu", "--quiet")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """val.json, its pictures beside it."""
    folder = tmp_path_factory.mktemp("benchmark")
    noise = np.random.default_rng(0)
    answerer = Answerer(load_pretrained(MODEL, device="cpu"), Decoding(max_new_tokens=4))
    records = []
    for index in range(12):
        name = f"{index}.png"
        pixels = noise.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((96, 96)).save(folder / name)
        for kind, prompt in PROMPTS.items():
            said = answerer([Question.from_prompt(prompt, [open_image(folder / name)])])[0].answer
            record = {"id": f"{index}-{kind}", "image": name, "prompt": prompt, "kind": kind}
            records.append({**record, "answer": said})
    path = folder / "val.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with `topk_cls` as its own method, which needs no calibration."""
    folder = tmp_path_factory.mktemp("checkpoint")
    loaded = load_pretrained(MODEL, device="cpu")
    prompt = PromptFormat.from_processor(loaded.processor)
    attached = attach(loaded.model, PruneConfig(method="topk_cls", keep=0.5), prompt=prompt)
    save_pretrained(folder, loaded.model, loaded.processor, attached)
    return folder


def parse(*options: str) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["eval", *options])


@pytest.fixture
def evaluate(checkpoint: Path, data: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs the command on the small benchmark into tmp_path/out."""

    def call(*options: str, **changed: Any) -> int:
        source = changed.get("data", data)
        fixed = ["--model", str(changed.get("model", checkpoint)), "--task", "records"]
        fixed += ["--data", str(source), "--output", str(tmp_path / "out"), *SMALL]
        args = parse(*fixed, *options)
        return args.run(args)

    return call


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file without what a clock says."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def case_file(folder: Path, name: str) -> Path:
    """The answers of a case; there is one run in the folder."""
    (found,) = (folder / "out" / "answers").glob(f"*/{name}.jsonl")
    return found


def rows(folder: Path) -> dict[tuple[str, float], dict[str, Any]]:
    """The lines of the one run of a folder."""
    (run,) = json.loads((folder / "out" / "eval.json").read_text())["runs"]
    return {(row["method"], row["keep"]): row for row in run["rows"]}
