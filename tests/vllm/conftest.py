"""One environment of vLLM's for all tests here, which run one after another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from itprune import PromptFormat, PruneConfig, attach, load_pretrained, save_pretrained
from itprune.cli import main
from tests.lmms.inside import Inside
from tests.vllm.environment import VARIABLES, environment
from tests.vllm.models import build
from tests.vllm.server import Server, node


@pytest.fixture(scope="package")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    """The environment, with what vLLM is told by variables."""
    with pytest.MonkeyPatch.context() as patch, environment(_work(tmp_path_factory)) as inside:
        for name, value in VARIABLES.items():
            patch.setenv(name, value)
        yield inside


def _work(factory: pytest.TempPathFactory) -> Path:
    return factory.mktemp("vllm")


@pytest.fixture(scope="package")
def exported(vllm: Inside) -> Path:
    """A pruned checkpoint, exported by the command."""
    build("llava", vllm.work / "base")
    loaded = load_pretrained(vllm.work / "base", device="cpu")
    prompt = PromptFormat.from_processor(loaded.processor)
    attached = attach(loaded.model, PruneConfig(keep=None), prompt=prompt)
    save_pretrained(vllm.work / "run", loaded.model, loaded.processor, attached)
    words = ["export", str(vllm.work / "run"), "--to", "vllm", "--dtype", "float32"]
    assert main(words) == 0
    return vllm.work / "run-vllm"


@pytest.fixture(scope="package")
def stock(vllm: Inside, exported: Path) -> Iterator[Server]:
    """vLLM's own class, by the documented script; the plug-in is installed and not asked for."""
    with node(vllm, exported) as server:
        yield server
