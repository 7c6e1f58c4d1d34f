"""Servers for tests that speak vLLM's dialect, as processes that can be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.tiny_llava import build_model, build_processor

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Server:
    """One of them."""

    pid: int
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> list[dict[str, Any]]:
        """What it was asked."""
        with urllib.request.urlopen(f"{self.url}/log") as answer:
            return json.load(answer)

    def kill(self) -> None:
        """Ends it at once, where it has not ended; its number cannot be another's meanwhile."""
        os.kill(self.pid, signal.SIGKILL)

    def freeze(self) -> None:
        """It holds its connections, and does nothing more."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on."""
        os.kill(self.pid, signal.SIGCONT)


class Servers:
    """Makes servers, quickly: they are forks of one process that has the model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.serving.fake_vllm", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        self._started: list[Server] = []
        assert self._process.stdout is not None
        while self._process.stdout.readline().strip() != "ready":
            assert self._process.poll() is None

    def start(self, **ways: Any) -> Server:
        """One more; see `fake_vllm.Ways`, and `port`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(ways) + "\n")
        self._process.stdin.flush()
        server = Server(**json.loads(self._process.stdout.readline()))
        self._started.append(server)
        return server

    def end_all(self) -> None:
        """Ends those that were started since the last time."""
        for server in self._started:
            server.kill()
        self._started.clear()

    def close(self) -> None:
        self.end_all()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def build_wide(folder: Path, template: str) -> Path:
    """A tiny LLaVA with weights so wide that pictures and words change its long answers."""
    processor = build_processor(template)
    model: Any = build_model(processor)
    draw = torch.Generator().manual_seed(1)
    for key, weight in model.named_parameters():
        if weight.ndim >= 2:
            width = 0.7 if "embed" in key else 0.6 / weight.shape[-1] ** 0.5
            weight.data.copy_(torch.randn(weight.shape, generator=draw) * width)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
