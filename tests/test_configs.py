"""Every YAML of the project loads, says how to run it, and names only files that can exist."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml

from train.launcher import ZERO2
from train.recipe.config import load_recipe

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PROMISED = ("lora_pruned", "lora_dense", "full_pruned", "pretrain_pruned", "quickstart")


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(path: Path) -> list[str]:
    """The indented lines of the comment that opens a file."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if line.startswith("#   "):
            lines.append(line[1:].strip())
    return lines


def test_the_promised_recipes_are_there() -> None:
    assert {f"configs/{name}.yaml" for name in PROMISED} <= {names(path) for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=names)
def test_a_recipe_loads_and_its_commands_too(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.output.name.startswith(path.stem)
    runs = [shlex.split(line, comments=True) for line in commands(path) if "launch/" in line]
    assert runs, f"{names(path)} does not open with the command that runs it"
    for words in runs:
        assert words[0] in ("python", "deepspeed", "accelerate")
        script = words.index("launch/train.py")
        assert words[script + 1] == names(path)
        load_recipe(path, words[script + 2 :])
    zero = recipe.trainer.get("deepspeed")
    assert zero is None or (ROOT / zero).is_file()


def test_the_control_differs_only_in_what_it_controls() -> None:
    pruned = load_recipe(ROOT / "configs/lora_pruned.yaml").to_dict()
    dense = load_recipe(ROOT / "configs/lora_dense.yaml").to_dict()
    assert pruned.pop("prune")["keep"] == 0.22
    assert pruned["trainer"].pop("output_dir") != dense["trainer"].pop("output_dir")
    assert pruned == dense


def test_the_launchers_files_are_what_they_claim() -> None:
    for path in (ROOT / "launch/deepspeed").glob("*.json"):
        stage = json.loads(path.read_text())["zero_optimization"]["stage"]
        assert f"zero{stage}" in path.stem
    assert (ROOT / ZERO2).is_file()
    cpu2 = yaml.safe_load((ROOT / "launch/accelerate/cpu2.yaml").read_text())
    assert cpu2["distributed_type"] == "MULTI_GPU"
    assert cpu2["use_cpu"] is True
    assert cpu2["num_processes"] == 2
