"""Servers that speak vLLM's dialect, and the model itself to compare them with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from itprune.serving.encoder import Encoder
from tests.serving.reference import Reference, questions
from tests.serving.upstream.asked import KEEP, TOKENS
from tests.serving.upstreams import Servers, build_wide
from tests.tiny_llava import PLAIN


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wide(tmp_path_factory.mktemp("wide"), PLAIN)


@pytest.fixture(scope="package")
def forge(folder: Path) -> Iterator[Servers]:
    servers = Servers(folder)
    yield servers
    servers.close()


@pytest.fixture
def servers(forge: Servers) -> Iterator[Servers]:
    yield forge
    forge.end_all()


@pytest.fixture(scope="package")
def encoder(folder: Path) -> Encoder:
    return Encoder.load(folder, keep=KEEP, device="cpu")


@pytest.fixture(scope="package")
def own(folder: Path) -> list[str]:
    """What the model itself says to `questions`."""
    reference = Reference(folder, KEEP)
    return [reference.answer(question, TOKENS).answer for question in questions()]
