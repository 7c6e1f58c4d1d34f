"""A small server that speaks vLLM's dialect and answers with a model of ours on the rows it gets.

Started once as a process that loads the model; each line on its stdin (JSON, see `Ways`) makes it
fork a server on a port of its own, whose {"pid", "port"} it prints. A server is ended by its pid,
which stays its own as long as this process lives, since nobody collects it.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from torch import Tensor

from itprune import load_pretrained
from itprune.decoding import Decoding, RowSampler

NAME = "its/own name"


@dataclass(frozen=True)
class Ways:
    """How a server behaves."""

    hold: int | None = None
    """It says nothing more behind so many tokens of an answer."""
    cut: int | None = None
    """It ends an answer with an error behind so many tokens."""
    status: int = 200
    """Of every answer but those about itself."""
    busy: int = 0
    """So many requests are refused with 429 before others are answered."""
    die: int | None = None
    """It ends behind so many tokens of an answer."""
    endless: bool = False
    """Its answers have no end."""
    message: str = "no"
    """Of a refusal."""
    health: int = 200
    key: str = ""
    context: int = 512
    ragged: bool = True
    """False: images of unlike numbers of rows end it, as they do a stock one."""
    twist: bool = False
    """It says other tokens than it should."""


class Fake:
    """One server."""

    def __init__(self, folder: Path, ways: Ways) -> None:
        loaded = load_pretrained(folder, dtype=torch.float32, device="cpu")
        self.model: Any = loaded.model
        self.processor: Any = loaded.processor
        self.ways = Ways()
        self.log: list[dict[str, Any]] = []
        self.counts: list[int] = []

    def app(self, ways: Ways) -> Starlette:
        self.ways = ways
        return Starlette(
            routes=[
                Route("/health", lambda request: Response(status_code=ways.health)),
                Route("/v1/models", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/log", lambda request: JSONResponse(self.log)),
            ]
        )

    async def models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": NAME, "max_model_len": self.ways.context}]})

    # ------------------------------------------------------------------------ prompts
    async def completions(self, request: Request) -> Response:
        body = await request.json()
        if body.get("prompt_embeds"):
            rows = read_rows(body["prompt_embeds"])
        else:
            rows = self.embed(torch.tensor(body["prompt"]))
        return self.answer(request, body, rows, lambda new: {"text": "", "token_ids": new})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        images = [
            read_rows(part["image_embeds"])
            for message in body["messages"]
            for part in message["content"]
            if part["type"] == "image_embeds"
        ]
        self.counts += map(len, images)
        if not self.ways.ragged and len(set(self.counts)) > 1:
            os._exit(1)
        return self.answer(request, body, self.prompt(body, images), chat_choice)

    def prompt(self, body: dict[str, Any], images: list[Tensor]) -> Tensor:
        """(T, W) rows of the rendered prompt."""
        for message in body["messages"]:
            for part in message["content"]:
                if part.pop("image_embeds", None) is not None:
                    part["type"] = "image"
        go_on = body.get("continue_final_message", False)
        text = self.processor.apply_chat_template(
            body["messages"],
            tokenize=False,
            add_generation_prompt=body.get("add_generation_prompt", True),
            continue_final_message=go_on,
        )
        ids = self.processor.tokenizer(text, add_special_tokens=body["add_special_tokens"])
        left, parts = iter(images), []
        for token in ids["input_ids"]:
            image = token == self.processor.image_token_id
            parts.append(next(left) if image else self.embed(torch.tensor([token])))
        return torch.cat(parts)

    def embed(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.get_input_embeddings()(ids)

    # ------------------------------------------------------------------------ answers
    def answer(self, request: Request, body: dict[str, Any], rows: Tensor, choice: Any) -> Response:
        ways = self.ways
        self.log.append(
            {
                "path": request.url.path,
                "rows": len(rows),
                "max_tokens": body["max_tokens"],
                "keys": sorted(body),
            }
        )
        if len(self.log) <= ways.busy:
            return refuse(429, "busy")
        if ways.key and request.headers.get("authorization") != f"Bearer {ways.key}":
            return refuse(401, "Unauthorized")
        if body["model"] != NAME:
            return refuse(404, f"The model `{body['model']}` does not exist.")
        if ways.status != 200:
            return refuse(ways.status, ways.message)
        if len(rows) + body["max_tokens"] > ways.context:
            return refuse(400, f"maximum context length is {ways.context} tokens. Reduce it.")
        return StreamingResponse(self.events(body, rows, choice), media_type="text/event-stream")

    async def events(self, body: dict[str, Any], rows: Tensor, choice: Any) -> AsyncIterator[str]:
        if choice is chat_choice:
            first = {"index": 0, "delta": {"role": "assistant", "content": ""}}
            yield event({"choices": [{**first, "finish_reason": None}]})
        said = 0
        async for new, finish in self.tokens(body, rows):
            if self.ways.hold == said:
                await asyncio.Event().wait()
            if self.ways.die == said:
                os._exit(1)
            if self.ways.cut == said:
                yield event({"error": {"message": "EngineCore died.", "code": 500}})
                break
            said += 1
            yield event({"choices": [{**choice([new]), "index": 0, "finish_reason": finish}]})
        yield "data: [DONE]\n\n"

    async def tokens(
        self, body: dict[str, Any], rows: Tensor
    ) -> AsyncIterator[tuple[int, str | None]]:
        """Each token, and what ends the answer."""
        draw = Decoding(body["max_tokens"], body["temperature"], body["top_p"], body["seed"])
        sampler = RowSampler(draw, [draw.seed]) if draw.temperature else None
        cache, given = None, rows[None]
        for index in itertools.count() if self.ways.endless else range(draw.max_new_tokens):
            with torch.no_grad():
                out = self.model(inputs_embeds=given, past_key_values=cache, use_cache=True)
            cache, scores = out.past_key_values, out.logits[:, -1].float()
            if sampler is not None:
                scores = sampler(torch.zeros(1, 0, dtype=torch.long), scores)
            token = int(scores.topk(2).indices[0, int(self.ways.twist)])
            given = self.embed(torch.tensor([[token]]))
            if token in body["stop_token_ids"]:
                yield token, "stop"
                return
            last = index + 1 == draw.max_new_tokens and not self.ways.endless
            yield token, "length" if last else None
            await asyncio.sleep(0)


def chat_choice(new: list[int]) -> dict[str, Any]:
    return {"delta": {"content": "x"}, "token_ids": new}


def read_rows(text: str) -> Tensor:
    """As vLLM reads them."""
    return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True).float()


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def refuse(status: int, message: str) -> Response:
    body = {"error": {"message": message, "type": "BadRequestError", "code": status}}
    return JSONResponse(body, status) if status != 502 else PlainTextResponse("bad gateway", 502)


def serve(fake: Fake, ways: Ways, port: int) -> None:
    """Serves until it is killed; tells where."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(128)
    print(json.dumps({"pid": os.getpid(), "port": listener.getsockname()[1]}), flush=True)
    config = uvicorn.Config(fake.app(ways), log_level="warning", lifespan="off")
    uvicorn.Server(config).run(sockets=[listener])


def main() -> None:
    torch.set_num_threads(1)
    fake = Fake(Path(sys.argv[1]), Ways())
    print("ready", flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        port = wanted.pop("port", 0)
        if os.fork() == 0:
            serve(fake, Ways(**wanted), port)
            os._exit(0)


if __name__ == "__main__":
    main()
