"""How questions are put: the instruction after a question, and options as lettered lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from itprune.question import ROLES


def with_options(question: str, hint: str, options: Mapping[str, str]) -> str:
    """A multiple-choice question as LLaVA asks it: hint, question, one line an option.

    Args:
        question: what is asked.
        hint: what is said before; "": nothing.
        options: letter -> text.
    """
    lines = [hint] if hint else []
    return "\n".join([*lines, question, *(f"{letter}. {text}" for letter, text in options.items())])


def with_instruction(record: Mapping[str, Any], instruction: str) -> Mapping[str, Any]:
    """The record with the instruction after its last question; a malformed one as it is.

    Args:
        record: as `Question.from_record` takes it.
        instruction: "" adds nothing.
    """
    if not instruction:
        return record
    if isinstance(record.get("prompt"), str):
        return {**record, "prompt": f"{record['prompt'].rstrip()}\n{instruction}"}
    layout = "messages" if record.get("messages") is not None else "conversations"
    role, text = ("role", "content") if layout == "messages" else ("from", "value")
    turns = record.get(layout)
    if not isinstance(turns, list):
        return record
    asking = [
        place
        for place, turn in enumerate(turns)
        if isinstance(turn, Mapping) and ROLES.get(str(turn.get(role))) == "user"
    ]
    if not asking:
        return record
    turn = turns[asking[-1]]
    changed = {**turn, text: _followed(turn.get(text), instruction)}
    return {**record, layout: [*turns[: asking[-1]], changed, *turns[asking[-1] + 1 :]]}


def _followed(content: Any, instruction: str) -> Any:
    if isinstance(content, str):
        return f"{content.rstrip()}\n{instruction}"
    if isinstance(content, list):
        return [*content, {"type": "text", "text": f"\n{instruction}"}]
    return content
