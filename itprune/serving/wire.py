"""Wires: how a question whose images are encoded is put to a vLLM server.

    prompt    /v1/completions with the rows of the whole prompt; any stock server that was started
              with --enable-prompt-embeds, images of any number of rows, exactly our prompt
    images    /v1/chat/completions with image_embeds parts between the words; a server that was
              started with --enable-mm-embeds. The chat template is the server's. Images of unlike
              numbers of rows end a stock one: it needs the plug-in, or one count for all

Rows travel as vLLM wants them: base64 of torch.save. We write that format and never read it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from itprune.answer import Answerer
from itprune.decoding import Decoding
from itprune.serving.encoder import Encoder, Rows

Body = dict[str, Any]


def payload(rows: Tensor) -> str:
    """(n, W) rows as text."""
    file = io.BytesIO()
    torch.save(rows.clone(), file)  # a slice would take all it is a slice of with it
    return base64.b64encode(file.getvalue()).decode("ascii")


@dataclass(frozen=True)
class Draw:
    """How an answer is drawn, in vLLM's words.

    All that can be said is said: for what a request leaves out, a server takes what the model's
    generation_config.json recommends. `generate`, which draws for us elsewhere, takes no more from
    there than the penalty on repetition.
    """

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop_token_ids: tuple[int, ...]
    repetition_penalty: float

    @classmethod
    def of(cls, answerer: Answerer, decoding: Decoding) -> Draw:
        """As a model answers here."""
        return cls(
            decoding.max_new_tokens,
            decoding.temperature,
            decoding.top_p,
            decoding.seed,
            answerer.stops,
            answerer.model.generation_config.repetition_penalty or 1.0,
        )

    def to_body(self) -> Body:
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": self.seed,
            "stop_token_ids": list(self.stop_token_ids),
        }


class Wire(Protocol):
    """One way to ask."""

    path: str
    """Of the address that is asked."""
    flag: str
    """What the server has to be started with."""

    def ask(self, rows: Rows) -> Body:
        """A question."""

    def go_on(self, rows: Rows, ids: Sequence[int], text: str) -> Body:
        """The question with the beginning of its answer, to be gone on with.

        Args:
            rows: the question.
            ids: tokens of the answer so far, at least one.
            text: what they say.
        """

    @property
    def exact(self) -> bool:
        """Whether `go_on` hands over the very tokens; else their text, and an answer that was cut
        is better begun anew."""


class PromptWire:
    """The rows of the whole prompt, or its token ids where it has no image."""

    path = "/v1/completions"
    flag = "--enable-prompt-embeds"
    exact = True

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def ask(self, rows: Rows) -> Body:
        return self.go_on(rows, (), "")

    def go_on(self, rows: Rows, ids: Sequence[int], text: str) -> Body:
        if not rows.visual_kept:
            return {"prompt": [*rows.ids.tolist(), *ids]}
        table, said = self.encoder.table, torch.tensor(ids, dtype=torch.long)
        whole = table[torch.cat([rows.ids.masked_fill(rows.visual, 0), said])]
        whole = whole.to(rows.features.dtype)
        whole[: len(rows.ids)][rows.visual] = rows.features
        return {"prompt_embeds": payload(whole)}


class ImagesWire:
    """Chat messages whose images are rows.

    Args:
        encoder: of the rows.

    Raises:
        ValueError: the rows of this family's images do not stand together, or it knows no turns.
    """

    path = "/v1/chat/completions"
    flag = "--enable-mm-embeds"
    exact = False

    def __init__(self, encoder: Encoder) -> None:
        if not encoder.together:
            raise ValueError(
                "the images of this model have marks between their rows, so they cannot be sent "
                "one by one; send whole prompts (--wire prompt)"
            )

    def ask(self, rows: Rows) -> Body:
        images = iter(rows.each())
        return {
            "messages": [_message(message, images) for message in rows.prepared.messages],
            "add_special_tokens": rows.prepared.special,
        }

    def go_on(self, rows: Rows, ids: Sequence[int], text: str) -> Body:
        body = self.ask(rows)
        said = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        body["messages"].append(said)
        return {**body, "continue_final_message": True, "add_generation_prompt": False}


WIRES: Mapping[str, type[PromptWire] | type[ImagesWire]] = {
    "prompt": PromptWire,
    "images": ImagesWire,
}


def _message(message: Mapping[str, Any], images: Any) -> dict[str, Any]:
    parts = [
        {"type": "image_embeds", "image_embeds": payload(next(images))}
        if part["type"] == "image"
        else {"type": "text", "text": part["text"]}
        for part in message["content"]
    ]
    return {"role": message["role"], "content": parts}
