"""One environment of vLLM's for all tests here, which run one after another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lmms.inside import Inside
from tests.vllm.environment import VARIABLES, environment


@pytest.fixture(scope="package")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    """The environment, with what vLLM is told by variables."""
    with pytest.MonkeyPatch.context() as patch, environment(_work(tmp_path_factory)) as inside:
        for name, value in VARIABLES.items():
            patch.setenv(name, value)
        yield inside


def _work(factory: pytest.TempPathFactory) -> Path:
    return factory.mktemp("vllm")
