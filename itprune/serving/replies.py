"""Replies: what stands in an answer, as OpenAI's clients read it.

Beside OpenAI's fields there is `itprune`: which pruner answered, and how many tokens it kept.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from itprune.serving.backend import Facts, Piece, Request, Usage
from itprune.serving.openai_errors import ApiError

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Reply:
    """The parts that all replies to a request have in common."""

    model: str
    method: str
    keep: float
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def to(cls, request: Request, facts: Facts) -> Reply:
        """A reply to a request."""
        return cls(facts.name, request.method, request.keep)

    def whole(self, text: str, last: Piece) -> Mapping[str, Any]:
        """An answer at once.

        Args:
            text: all of it.
            last: its last piece.
        """
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": last.finish,
            "logprobs": None,
        }
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            **self._costs(last.usage),
        }

    def first(self) -> str:
        """The event that begins a stream."""
        return self._chunk({"role": "assistant", "content": ""}, None)

    def piece(self, piece: Piece) -> str:
        """The events of a piece; none where it says nothing."""
        said = self._chunk({"content": piece.text}, None) if piece.text else ""
        return said if piece.finish is None else said + self._chunk({}, piece.finish)

    def usage(self, usage: Usage) -> str:
        """The event that says what a stream cost."""
        return _event({**self._head("chat.completion.chunk"), "choices": [], **self._costs(usage)})

    def _chunk(self, delta: Mapping[str, Any], finish: str | None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _costs(self, usage: Usage) -> dict[str, Any]:
        return {
            "usage": {
                "prompt_tokens": usage.tokens_in,
                "completion_tokens": usage.tokens_out,
                "total_tokens": usage.tokens_in + usage.tokens_out,
            },
            "itprune": {
                "method": self.method,
                "keep": self.keep,
                "kept_tokens": usage.tokens_kept,
                "visual_tokens": usage.visual_in,
                "kept_visual_tokens": usage.visual_kept,
            },
        }


def failure(error: ApiError) -> str:
    """The event that ends a stream which failed."""
    return _event(error.body())


def models(facts: Facts) -> Mapping[str, Any]:
    """The list of one model."""
    return {"object": "list", "data": [model(facts)]}


def model(facts: Facts) -> Mapping[str, Any]:
    """The model, as in the list."""
    return {
        "id": facts.name,
        "object": "model",
        "created": facts.created,
        "owned_by": "itprune",
        "max_model_len": facts.context,
        "methods": list(facts.methods),
    }


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
