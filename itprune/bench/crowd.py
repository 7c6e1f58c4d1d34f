"""Crowd: requests of many users at once, for a model of a shape with random weights.

They differ in pictures and in the length of their text, and pass a real processor, as requests to
a server do. Its words are bare numbers: a random model has no language.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from itprune.bench.llava_shapes import LlavaNextShape, LlavaShape
from itprune.bench.shape import FIRST_ID, Shape
from itprune.bench.shapes import find_shape
from itprune.question import Question

PAD, END = 0, 2
PICTURES = (1, 2, 1, 0, 1, 3, 1, 1)
"""How many a request has, in turns."""
ASPECTS = ((1.0, 1.0), (4 / 3, 1.0), (1.0, 4 / 3), (1.0, 1.0), (16 / 9, 1.0))
"""Width and height of pictures, in edges of what the tower sees."""
TEXTS = (16, 128)
"""Words of the shortest and of the longest request."""
TEMPLATE = (
    "<s>{% for m in messages %}{% for c in m['content'] %}"
    "{{ '<image>' if c['type'] == 'image' else ' ' + c['text'] }}{% endfor %}{% endfor %}"
)


def find_llava(name: str) -> LlavaShape:
    """The shape of a name, if requests can be made for it.

    Raises:
        ValueError: an unknown name, no LLaVA, or a machine too small for it.
    """
    shape = find_shape(name)
    if not isinstance(shape, LlavaShape):
        raise ValueError(f"--shape {name}: `itprune bench serve` takes LLaVA's: tiny, cpu, …")
    return shape


def build_processor(shape: LlavaShape) -> Any:
    """The processor of a shape's model."""
    square = {"height": shape.image_size, "width": shape.image_size}
    look: dict[str, Any] = {
        "size": {"shortest_edge": shape.image_size},
        "crop_size": square,
        "image_mean": [0.5] * 3,
        "image_std": [1 / 6] * 3,
    }
    rest: dict[str, Any] = {
        "tokenizer": _tokenizer(shape),
        "patch_size": shape.patch,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": TEMPLATE,
    }
    if isinstance(shape, LlavaNextShape):
        edge = shape.tiles * shape.image_size
        tiles = LlavaNextImageProcessor(**look, image_grid_pinpoints=[[edge, edge]])
        return LlavaNextProcessor(image_processor=tiles, **rest)
    return LlavaProcessor(image_processor=CLIPImageProcessor(**look), **rest)


def _tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    special = {PAD: "<pad>", FIRST_ID: "<s>", END: "</s>", shape.image_id: "<image>"}
    words = {special.get(id, str(id)): id for id in range(shape.vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )


def make_crowd(shape: LlavaShape, count: int) -> list[Question]:
    """So many requests, always the same ones."""
    draw = torch.Generator().manual_seed(0)
    wanted = [PICTURES[index % len(PICTURES)] for index in range(count)]
    shares = shape.noise_share(sum(wanted))
    shuffled = shares[torch.randperm(len(shares), generator=draw)].tolist()
    pictures = (
        _picture(shape, share, ASPECTS[index % len(ASPECTS)])
        for index, share in enumerate(shuffled)
    )
    return [Question.from_prompt(_text(shape, draw), list(islice(pictures, own))) for own in wanted]


def _text(shape: Shape, draw: torch.Generator) -> str:
    low, high = TEXTS
    length = int(torch.randint(low, high + 1, (), generator=draw))
    return " ".join(map(str, torch.randint(*shape.words, (length,), generator=draw).tolist()))


def _picture(shape: LlavaShape, share: float, aspect: Sequence[float]) -> Image.Image:
    """One texture in every patch, plus a share of noise; see shape.py."""
    width, height = (round(side * shape.image_size / shape.patch) for side in aspect)
    draw = np.random.default_rng(int(share * 1e6))
    texture = np.tile(draw.standard_normal((shape.patch, shape.patch, 3)), (height, width, 1))
    mixed = (1 - share) ** 0.5 * texture + share**0.5 * draw.standard_normal(texture.shape)
    return Image.fromarray(np.clip(127.5 + mixed * 255 / 6, 0, 255).astype(np.uint8))
