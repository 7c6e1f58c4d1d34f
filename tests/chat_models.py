"""Tiny chat models of several families in memory, with processors that need no torchvision."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image

from itprune import PromptFormat, PruneConfig, attach
from itprune.checkpoint import Loaded
from tests import tiny_folders, tiny_llava
from tests.tiny_templates import CHATML, tokenizer

NAMES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "idefics3", "gemma3")
QWEN = {"qwen2_5_vl": hf.Qwen2_5_VLProcessor, "qwen3_vl": hf.Qwen3VLProcessor}


def load(name: str, config: PruneConfig | None, processor: Any = None) -> Loaded:
    """A model, the same every time, pruned as `config` says; None: dense."""
    processor = processor or make_processor(name)
    if name == "llava":
        model: Any = wide(tiny_llava.build_model(processor))
    else:
        model = tiny_folders.build_model(name, processor)
    # A loop without a cache would take a placeholder the model says for an image.
    model.generation_config.suppress_tokens = [processor.image_token_id]
    model.eval()
    prompt = PromptFormat.from_processor(processor)
    return Loaded(model, processor, config and attach(model, config, prompt=prompt))


def make_processor(name: str) -> Any:
    if name == "llava":
        return tiny_llava.build_processor()
    return qwen(QWEN[name]) if name in QWEN else tiny_folders.MAKERS[name].processor()


def wide(model: Any) -> Any:
    """Weights so wide that pictures and words change the answers."""
    draw = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.ndim >= 2:
            width = 0.7 if "embed" in name else 0.6 / weight.shape[-1] ** 0.5
            weight.data.copy_(torch.randn(weight.shape, generator=draw) * width)
    return model


def qwen(base: Any) -> Any:
    """Qwen's processor without its part for videos, which needs torchvision."""

    class ImagesOnly(base):
        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str) -> None:
            self.image_token = tiny_folders.QWEN_TOKENS["image_token"]
            self.video_token = tiny_folders.QWEN_TOKENS["video_token"]
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
            parts = (image_processor, tokenizer)
            hf.ProcessorMixin.__init__(self, *parts, chat_template=chat_template)

    size = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return ImagesOnly(
        hf.Qwen2VLImageProcessor(size=size, patch_size=tiny_folders.PATCH, merge_size=2),
        tokenizer("<|im_start|>", "<|im_end|>", **tiny_folders.QWEN_TOKENS),
        CHATML.replace("IMAGE", image),
    )


def picture(seed: int) -> Image.Image:
    """Coloured squares."""
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((70, 60))
