"""Tiny models of every family for vLLM's CPU build, whose attention takes no smaller heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from PIL import Image

from tests import tiny_llava
from tests.tiny_folders import MAKERS

WIDTH, HEAD = 128, 32
QUESTION = "What colour is the square?"
PLACES = {
    "gemma3": "<start_of_image>",
    "internvl": "<IMG_CONTEXT>",
    "paligemma": "",
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "<|vision_start|><|image_pad|><|vision_end|>"
    ),
}
"""What a prompt says where a picture stands; `<image>` in the other families."""


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Coloured noise of several shapes."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [(56, 56), (70, 60), (112, 56)]
    pixels = torch.randint(0, 256, (count, 8, 8, 3), generator=draw, dtype=torch.uint8).numpy()
    return [Image.fromarray(p).resize(shapes[i % 3]) for i, p in enumerate(pixels)]


def build(name: str, folder: Path) -> None:
    """Writes a random float32 model and its processor."""
    processor, config = _parts(name)
    text = config.text_config
    text.hidden_size, text.num_attention_heads, text.head_dim = WIDTH, 4, HEAD
    if name == "gemma3":
        text.query_pre_attn_scalar = HEAD
    if "mrope_section" in (text.rope_parameters or {}):
        text.rope_parameters["mrope_section"] = [4, 4, 8]
    for part in (config, config.vision_config):
        for key in {"out_hidden_size", "projection_dim"} & part.to_dict().keys():
            setattr(part, key, WIDTH)
    if name == "qwen2_vl":
        config.vision_config.hidden_size = WIDTH
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(config)
    draw = torch.Generator().manual_seed(1)
    for key, weight in model.named_parameters():
        if weight.ndim >= 2:
            width = 0.7 if "embed" in key else 0.6 / weight.shape[-1] ** 0.5
            weight.data.copy_(torch.randn(weight.shape, generator=draw) * width)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _parts(name: str) -> tuple[Any, Any]:
    """Processor, and the config of a model that fits it."""
    if name == "llava":
        processor = tiny_llava.build_processor()
        return processor, tiny_llava.build_model(processor).config
    processor = MAKERS[name].processor()
    if name in ("gemma3", "paligemma"):  # vLLM looks for line ends in their vocabularies
        processor.tokenizer.add_tokens(["\n" * count for count in (1, 2, 3, 4)])
    return processor, MAKERS[name].config(processor)
