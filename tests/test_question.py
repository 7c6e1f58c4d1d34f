"""Question-aware methods: what is remembered of questions, and of images encoded before them."""

from __future__ import annotations

from inspect import signature

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from itprune import PromptFormat, PruneConfig, attach
from tests.models import ASSISTANT, ROWS, batch, prompts, tiny_llava

PROMPT = PromptFormat((0, 1, 2, *ASSISTANT), ASSISTANT)
CONFIG = PruneConfig("quecc", keep=None, options={"kernel": 2})
ENCODES_ONCE = "mm_encoder_outputs" in signature(LlavaForConditionalGeneration.forward).parameters


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "loaded"])
def test_questions_are_read_with_the_weights_in_force(trained: bool) -> None:
    model, data = tiny_llava(), prompts(batch(ROWS[:2]))
    torch.manual_seed(0)
    with attach(model, CONFIG, prompt=PROMPT) as pruner, torch.no_grad():
        model.train(trained)(**data)
        for weight in model.get_decoder().parameters():
            weight.mul_(1.3)
        found = model.eval()(**data).logits
        state = pruner.method.state_dict()
    fresh = tiny_llava()
    fresh.load_state_dict(model.state_dict())
    with attach(fresh, CONFIG, prompt=PROMPT) as pruner, torch.no_grad():
        pruner.method.load_state_dict(state)
        assert torch.equal(fresh(**data).logits, found)


def test_the_same_question_is_read_once_at_inference() -> None:
    model, data, reads = tiny_llava(), prompts(batch(ROWS[:1])), []
    with attach(model, CONFIG, prompt=PROMPT), torch.no_grad():
        model.get_decoder().register_forward_hook(lambda *_: reads.append(1))
        for _ in range(3):
            model(**data)
    assert len(reads) == 1 + 3


@pytest.mark.skipif(not ENCODES_ONCE, reason="this transformers takes no encoder outputs")
def test_only_the_images_encoded_last_are_answered_late() -> None:
    model, text = tiny_llava(), prompts(batch(ROWS[:3]))
    pixels = text.pop("pixel_values")
    with attach(model, CONFIG, prompt=PROMPT), torch.no_grad():
        expected = model(**text, pixel_values=pixels).logits
        first = model.get_image_features(pixel_values=pixels, return_dict=True)
        found = model(**text, mm_encoder_outputs={"image": first}).logits
        assert torch.equal(found, expected)
        first = model.get_image_features(pixel_values=pixels, return_dict=True)
        model.get_image_features(pixel_values=pixels.flip(0), return_dict=True)
        with pytest.raises(ValueError, match="pass pixel_values"):
            model(**text, mm_encoder_outputs={"image": first})
