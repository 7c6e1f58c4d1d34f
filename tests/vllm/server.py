"""A real vLLM server on this machine, and questions to it."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from tests.lmms.inside import ROOT, Inside
from tests.vllm.documented import documented

T = TypeVar("T")
R = TypeVar("R")
SMALL = (
    "--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "16",
    "--limit-mm-per-prompt", '{"image": 2}', "--host", "127.0.0.1",
)  # fmt: skip
TOKENS = 12


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@dataclass(frozen=True)
class Server:
    """One that answers."""

    url: str
    process: subprocess.Popen[bytes]
    model: str

    def ask(self, path: str, **body: Any) -> tuple[int, Any]:
        """Status and answer of one request, of `TOKENS` greedy tokens; None leaves a field out."""
        given = {
            "model": self.model, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, **body,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        request = urllib.request.Request(
            self.url + path, json.dumps(given).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=100) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def chat(self, *content: dict[str, str]) -> list[int]:
        """The tokens of an answer to one turn."""
        messages = [{"role": "user", "content": list(content)}]
        status, answer = self.ask("/v1/chat/completions", messages=messages)
        assert status == 200, answer
        ids: list[int] = answer["choices"][0]["token_ids"]
        return ids

    def complete(self, prompt: Tensor) -> list[int]:
        """The tokens of an answer to (T, W) rows."""
        status, answer = self.ask("/v1/completions", prompt_embeds=written(prompt))
        assert status == 200, answer
        ids: list[int] = answer["choices"][0]["token_ids"]
        return ids


def at_once(ask: Callable[[T], R], given: Sequence[T]) -> list[R]:
    """Answers to requests that are all under way together."""
    with ThreadPoolExecutor(len(given)) as threads:
        return list(threads.map(ask, given))


def written(rows: Tensor) -> str:
    """A tensor as vLLM takes it."""
    buffer = io.BytesIO()
    torch.save(rows.contiguous(), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def image(rows: Tensor) -> dict[str, str]:
    """A part of a message: rows of an image."""
    return {"type": "image_embeds", "image_embeds": written(rows)}


def text(words: str) -> dict[str, str]:
    """A part of a message."""
    return {"type": "text", "text": words}


def shown(picture: Image.Image) -> Any:
    """A part of a message: pixels."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    address = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": address}}


@contextmanager
def serving(inside: Inside, command: Sequence[str], model: str, port: int) -> Iterator[Server]:
    """Starts a command of the environment, waits until it answers, and ends it."""
    log = inside.work / f"server-{port}.log"
    variables = {
        **os.environ, "HF_HOME": str(inside.work / "cache"), "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1", "PATH": f"{inside.folder / 'bin'}:{os.environ['PATH']}",
    }  # fmt: skip
    with log.open("wb") as told:
        process = subprocess.Popen(
            command,
            cwd=inside.work,
            env=variables,
            stdout=told,
            stderr=told,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, process, log)
        yield Server(url, process, model)
    finally:
        end(process)


@contextmanager
def node(inside: Inside, exported: Path) -> Iterator[Server]:
    """vLLM's own class on a folder, by the documented script."""
    port = free_port()
    ((script, _),) = documented("launch/vllm/node.sh")
    words = ["env", f"PORT={port}", str(ROOT / script), exported.name, *SMALL]
    with serving(inside, words, exported.name, port) as server:
        yield server


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, seconds: int = 180) -> None:
    """Until the server says that it is well."""
    for _ in range(2 * seconds):
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                continue
            raise AssertionError(log.read_text()[-3000:]) from None
    raise AssertionError(f"not up in {seconds} s: {log.read_text()[-3000:]}")


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a server with the processes it started."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
