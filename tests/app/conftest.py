"""One session of the bundled model, and a server on it inside the test process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the page needs pip install 'itprune[app]'")
pytest.importorskip("python_multipart", reason="the page needs pip install 'itprune[app]'")
pytest.importorskip("uvicorn", reason="the page needs pip install 'itprune[app]'")

from starlette.testclient import TestClient

from itprune import load_pretrained
from itprune.app.limits import Limits
from itprune.app.server import make_app
from itprune.app.session import Session
from itprune.app.worker import Worker

BUNDLED = Path(__file__).parents[2] / "assets" / "tiny-llava"
LIMITS = Limits(body_mb=0.2, pixels=200_000, prompt=300, answer=32)


@pytest.fixture(scope="session")
def session() -> Session:
    return Session(load_pretrained(BUNDLED), "tiny-llava", LIMITS)


@pytest.fixture
def client(session: Session) -> Iterator[TestClient]:
    worker = Worker(session, waiting=4)
    worker.start()
    app = make_app(session, worker)
    with TestClient(app, "http://127.0.0.1:7860", raise_server_exceptions=False) as client:
        yield client
    worker.close()
