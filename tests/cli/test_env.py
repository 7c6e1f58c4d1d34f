"""`itprune env`: what it says of this machine, and what it would say of a broken one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from itprune import environment
from itprune.cli import main
from itprune.environment import COMPILER, COMPILERS, GPU, NINJA, Feature, state_of, traps

TOOLS = dict.fromkeys(COMPILERS, "/usr/bin/there")
NO_TOOLS = dict.fromkeys(COMPILERS)


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Stands for what is installed; demands of packages on each other are those of `demands`."""
    found = {"torch": "2.13.0"}
    monkeypatch.setattr(environment, "installed", found.get)
    monkeypatch.setattr(environment, "requires", lambda name: ())
    monkeypatch.setattr(environment, "SHARED_MEMORY", Path("/nowhere"))
    monkeypatch.setattr(environment, "CUDA_DRIVER", Path("/nowhere"))
    return found


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert len(found["devices"]) == torch.accelerator.device_count()
    assert found["cores"] >= 1
    assert found["memory"] > 1 << 28
    ready = {feature["feature"]: feature["ready"] for feature in found["features"]}
    assert ready["train"]
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert f"torch         {torch.__version__}" in text
    assert f"{found['cores']} CPU cores" in text


def test_what_a_feature_lacks(versions: dict[str, str]) -> None:
    versions["deepspeed"] = "0.17.1"
    feature = Feature("x", ("deepspeed>=0.18", "torch"), (GPU, COMPILER, NINJA))
    state = state_of(feature, NO_TOOLS, gpu=False)
    assert state.missing == ("deepspeed>=0.18", GPU, COMPILER, NINJA)
    assert state.command == "pip install 'deepspeed>=0.18'"
    versions["deepspeed"] = "0.18.0"
    state = state_of(feature, TOOLS, gpu=True)
    assert state.ready
    assert state.command is None


def test_installing_torchvision_beside_a_cpu_build_names_the_index(
    versions: dict[str, str],
) -> None:
    plain = state_of(Feature("videos", ("torchvision",)), TOOLS, gpu=False).command
    assert plain == "pip install torchvision"
    versions["torch"] += "+cpu"
    named = state_of(Feature("videos", ("torchvision",)), TOOLS, gpu=False).command
    assert named == "pip install torchvision --index-url https://download.pytorch.org/whl/cpu"


def test_pairs_that_do_not_go_together(
    versions: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not list(traps(False, TOOLS))
    versions |= {"torchvision": "0.28.0", "torch": "2.14.0+cpu", "ninja": "1.13"}
    needs = ["torch==2.13.0", "pillow>=5; extra == 'x'", "unheard-of>=3"]
    monkeypatch.setattr(
        environment, "requires", lambda name: needs if name == "torchvision" else ()
    )
    monkeypatch.setattr(environment, "CUDA_DRIVER", Path(__file__))
    monkeypatch.setattr(environment, "SHARED_MEMORY", Path(__file__).parent)
    monkeypatch.setattr(environment, "SMALL", 1 << 62)
    said = list(traps(True, NO_TOOLS))
    expected = (
        "torchvision 0.28.0 needs torch==2.13.0, but it is 2.14.0+cpu",
        "importing it breaks transformers",
        "training would not use the GPU",
        "activate the environment",
        "data workers may die",
    )
    for part, sentence in zip(expected, said, strict=True):
        assert part in sentence
