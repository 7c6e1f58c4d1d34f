"""What a batch of text pays for the blank image that keeps ranks in step: counted, not timed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from itprune.bench.llava_shapes import LlavaShape
from itprune.bench.shapes import SHAPES
from itprune.families import find_family
from train.blank import BlankImage

ROWS, TOKENS = 16, 200


def llava_7b(blank: bool) -> nn.Module:
    """LLaVA-1.5-7B without memory: adapters' share of a step left out, projector trained."""
    shape = SHAPES["llava-1.5-7b"]
    assert isinstance(shape, LlavaShape)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shape.config(), dtype=torch.bfloat16)
    model.requires_grad_(False)
    for projector in find_family(model).projectors:
        projector.requires_grad_(True)
    # Gradients flow through the LLM, as they do to adapters, and not into the frozen tower.
    model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())
    if blank:
        BlankImage(model)
    return model.train()


def step_flops(blank: bool) -> int:
    model = llava_7b(blank)
    ids = torch.ones(ROWS, TOKENS, dtype=torch.long, device="meta")
    mask = torch.ones(ROWS, 1, TOKENS, TOKENS, dtype=torch.bool, device="meta")  # made: not read
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    total: int = counter.get_total_flops()
    return total


def test_a_blank_image_costs_less_than_one_percent_of_a_batch_of_text() -> None:
    text, both = step_flops(blank=False), step_flops(blank=True)
    tower = 2 * 577 * 24 * 12 * 1024**2  # every linear layer of CLIP-L on 24 x 24 patches and CLS
    assert both - text > tower
    assert both - text < 0.01 * text
    assert text == pytest.approx(4 * ROWS * TOKENS * 6.7e9, rel=0.05)
