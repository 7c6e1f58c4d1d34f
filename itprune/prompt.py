"""PromptFormat: the two facts about a chat template the pruner needs.

Template and special tokens are never dropped, and the instruction of a sample ends where the first
assistant turn begins, so that a later turn cannot decide what an earlier one may see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import ProcessorMixin


def _suffix(tokenizer: Any, text: str, start: str) -> tuple[int, ...]:
    """Tokens at the end of `text` that spell what it has beyond `start`, spaces aside.

    They are cut out of the whole text's tokens: behind a space a word may have other ones than
    alone.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    wanted = text[len(start) :].strip()
    for first in range(len(ids), -1, -1):
        if tokenizer.decode(ids[first:]).strip() == wanted:
            return tuple(ids[first:])
    return ()


def _between(processor: Any, asked: str) -> tuple[int, ...]:
    """Tokens between a question that ends in "word" and its answer, for templates that write the
    same whether an answer is due or not (Mistral's "[/INST]")."""
    said = {"role": "assistant", "content": [{"type": "text", "text": "answer"}]}
    turn = {"role": "user", "content": [{"type": "text", "text": "word"}]}
    text = str(processor.apply_chat_template([turn, said], tokenize=False))
    end = asked.rpartition("word")[2]
    if not text.startswith(asked) or not end.strip():
        return ()
    return _suffix(processor.tokenizer, asked, asked[: -len(end)])


@dataclass(frozen=True)
class PromptFormat:
    """Token ids of a chat template."""

    protected_ids: tuple[int, ...] = ()
    """Special tokens and every token of the empty template."""
    assistant_prefix: tuple[int, ...] = ()
    """What stands right before an answer, e.g. the tokens of "ASSISTANT:"."""

    @classmethod
    def from_processor(cls, processor: ProcessorMixin) -> PromptFormat:
        """Reads both from a processor's tokenizer and chat template."""
        tokenizer = processor.tokenizer
        special = set(tokenizer.all_special_ids)
        if not processor.chat_template:
            return cls(tuple(sorted(special)))

        def render(text: str, answer: bool) -> str:
            turn = {"role": "user", "content": [{"type": "text", "text": text}]}
            how = {"tokenize": False, "add_generation_prompt": answer}
            return str(processor.apply_chat_template([turn], **how))

        template = tokenizer.encode(render("", True), add_special_tokens=False)
        prefix = _suffix(tokenizer, render("word", True), render("word", False))
        prefix = prefix or _between(processor, render("word", False))
        return cls(tuple(sorted({*special, *template, *prefix})), prefix)

    def protected(self, ids: Tensor) -> Tensor:
        """(B, S) ids -> (B, S) bool: special and template tokens."""
        if not self.protected_ids:
            return torch.zeros_like(ids, dtype=torch.bool)
        return torch.isin(ids, torch.tensor(self.protected_ids, device=ids.device))

    def first_answer(self, ids: Tensor) -> Tensor:
        """(B, S) ids -> (B,) where the first assistant turn's text begins; S when there is none."""
        length, width = ids.shape[1], len(self.assistant_prefix)
        none = torch.full((len(ids),), length, device=ids.device)
        if not width or width > length:
            return none
        prefix = torch.tensor(self.assistant_prefix, device=ids.device)
        hit = (ids.unfold(1, width, 1) == prefix).all(-1)
        return torch.where(hit.any(1), hit.int().argmax(1) + width, none)

    def to_dict(self) -> dict[str, Any]:
        return {
            "protected_ids": list(self.protected_ids),
            "assistant_prefix": list(self.assistant_prefix),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptFormat:
        return cls(
            tuple(int(i) for i in values["protected_ids"]),
            tuple(int(i) for i in values["assistant_prefix"]),
        )
