"""PromptFormat: where the first answer begins, read from real processors' templates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from itprune import PromptFormat

BUNDLED = Path(__file__).parent.parent / "assets" / "tiny-llava"


@pytest.fixture(params=["bundled", "spaced"])
def processor(request: pytest.FixtureRequest, tiny_llava_folder: Path) -> object:
    return AutoProcessor.from_pretrained(
        BUNDLED if request.param == "bundled" else tiny_llava_folder
    )


def conversation(processor, *turns: str) -> str:
    roles = ("user", "assistant")
    messages = [
        {"role": roles[i % 2], "content": [{"type": "text", "text": text}]}
        for i, text in enumerate(turns)
    ]
    prompt = len(turns) % 2 == 1
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def test_the_first_answer_is_found_behind_any_question(processor) -> None:
    """A prefix has other tokens behind a space than alone: it must be found in running text."""
    prompt, tokenizer = PromptFormat.from_processor(processor), processor.tokenizer
    assert prompt.assistant_prefix
    for question in ("What digit is red?", "Is there a 7", "word"):
        asked = tokenizer.encode(conversation(processor, question), add_special_tokens=False)
        whole = tokenizer.encode(
            conversation(processor, question, "blue", "And now?", "red"), add_special_tokens=False
        )
        ids = torch.tensor([whole])
        start = int(prompt.first_answer(ids)[0])
        assert start == len(asked)
        assert tokenizer.decode(whole[start:]).strip().startswith("blue")
        assert bool(prompt.protected(ids)[0, start - len(prompt.assistant_prefix) : start].all())
