"""One endpoint on a random model, whose answers are long and differ, for all that only ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the endpoint needs pip install 'itprune[serve]'")
pytest.importorskip("uvicorn", reason="the endpoint needs pip install 'itprune[serve]'")
pytest.importorskip("prometheus_client", reason="the endpoint needs pip install 'itprune[serve]'")

from tests.app.asking import png
from tests.serving.endpoint import local, served
from tests.serving.scripted import Scripted
from tests.tiny_folders import build_folder


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures the server may open, with a secret beside it."""
    outer = tmp_path_factory.mktemp("outer")
    folder = outer / "pictures"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.png").write_bytes(png())
    (folder / "inner" / "b b.png").write_bytes(png(seed=3))
    (folder / "note.txt").write_text("no picture")
    (outer / "secret.png").write_bytes(png(seed=1))
    (folder / "link.png").symlink_to(outer / "secret.png")
    (folder / "ring").symlink_to(folder / "ring")
    (folder / "good.png").symlink_to(folder / "a.png")
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model that has more visual tokens where a picture is longer."""
    return build_folder("llava_next", tmp_path_factory.mktemp("next"))


@pytest.fixture(scope="session")
def url(folder: Path, files: Path) -> Iterator[str]:
    """An endpoint that anybody may ask."""
    with served(local(folder), files=files) as (address, _):
        yield address


@pytest.fixture
def backend() -> Scripted:
    """One that says what a test tells it."""
    return Scripted()
