"""What a model of ours says by itself, pruned before its language model and counted anew behind:
what a server elsewhere has to say on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from itprune import load_pretrained
from itprune.answer import Answer, Answerer
from itprune.attach import attach
from itprune.checkpoint import Loaded
from itprune.config import PruneConfig
from itprune.decoding import Decoding
from itprune.prompt import PromptFormat
from itprune.question import Question


class Reference:
    """One model with one pruner.

    Args:
        folder: of the model.
        keep: of its visual tokens.
        options: of the method itprune.
    """

    def __init__(self, folder: Path, keep: float | None, **options: Any) -> None:
        loaded = load_pretrained(folder, dtype=torch.float32, device="cpu")
        if loaded.attached is not None:
            loaded.attached.detach()
        config = PruneConfig(keep=keep, positions="contiguous", options={"stage2": None, **options})
        prompt = PromptFormat.from_processor(loaded.processor)
        attached = attach(loaded.model, config, prompt=prompt)
        self.loaded = Loaded(loaded.model, loaded.processor, attached)

    def answer(self, question: Question, tokens: int = 20) -> Answer:
        return Answerer(self.loaded, Decoding(tokens))([question])[0]

    def logits(self, question: Question) -> torch.Tensor:
        """(vocab,) scores of the first token."""
        answerer = Answerer(self.loaded)
        inputs = answerer.collate([answerer.encode(question)])
        with torch.no_grad():
            return answerer.model(**inputs).logits[0, -1]


def picture(seed: int, size: tuple[int, int] = (60, 70)) -> Image.Image:
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 255, (*size, 3), dtype=np.uint8))


def questions() -> list[Question]:
    """None, one and several pictures; a dialogue."""
    dialogue = (
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "The circle."}]},
        {"role": "user", "content": [{"type": "text", "text": "And on the left?"}]},
    )
    return [
        Question.from_prompt("What colour is the square?"),
        Question.from_prompt("What colour is the square?", [picture(0)]),
        Question.from_prompt("<image> or <image>?", [picture(1), picture(2, (56, 90))]),
        Question(dialogue, (picture(3),)),
    ]
