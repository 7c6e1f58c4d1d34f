"""Fixtures shared by all tests. Nothing here touches a network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    from tests.golden import FOLDER

    parser.addoption("--golden", default=str(FOLDER), help="folder of golden data to replay")


@pytest.fixture(scope="session")
def tiny_llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA (float32) whose template marks and ends the assistant turns."""
    from tests.tiny_llava import build_folder

    return build_folder(tmp_path_factory.mktemp("tiny_llava"))
