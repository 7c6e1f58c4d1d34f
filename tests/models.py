"""Tiny random models and batches for the engine's tests. No downloads, milliseconds a forward."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

VOCAB, IMAGE, PAD, PATCHES, DEPTH = 300, 290, 0, 36, 6
ASSISTANT = (250, 251)
"""Stands before every answer: the template's assistant prefix."""


def tiny_llava(kv_heads: int = 2, **text: object) -> LlavaForConditionalGeneration:
    """A LLaVA with 36 visual tokens an image and 6 LLM layers."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=24,
        patch_size=4,
    )
    options = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**{**options, **text}),
        image_token_id=IMAGE,
    )
    model = LlavaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.ndim >= 2:  # wide enough that attention is not flat
            width = 0.7 if "embed" in name else 0.6 / weight.shape[-1] ** 0.5
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * width)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()


# One row is a list of parts: an int is that many text tokens, "image" an image, "answer" a
# supervised answer behind the assistant prefix.
ROWS = (
    (5, "image", 9, "answer"),
    (3, "image", 4, "answer", 3, "answer"),
    (2, "image", 3, "image", 6, "answer"),
    (12, "answer"),
)


def batch(rows: tuple = ROWS, side: str = "right", seed: int = 0) -> dict[str, torch.Tensor]:
    """Collated inputs with labels for the given rows."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels, images = [], [], 0
    for row in rows:
        row_ids, row_labels = [torch.tensor([1])], [torch.tensor([-100])]
        for part in row:
            if part == "image":
                tokens, supervised, images = torch.full((PATCHES,), IMAGE), False, images + 1
            elif part == "answer":
                row_ids.append(torch.tensor(ASSISTANT))
                row_labels.append(torch.full((2,), -100))
                tokens, supervised = torch.randint(3, 250, (3,), generator=generator), True
            else:
                tokens, supervised = torch.randint(3, 250, (part,), generator=generator), False
            row_ids.append(tokens)
            row_labels.append(tokens if supervised else torch.full((len(tokens),), -100))
        ids.append(torch.cat(row_ids))
        labels.append(torch.cat(row_labels))
    return {
        **collate(ids, labels, side),
        **({"pixel_values": torch.randn(images, 3, 24, 24, generator=generator)} if images else {}),
    }


def collate(
    ids: list[torch.Tensor], labels: list[torch.Tensor], side: str
) -> dict[str, torch.Tensor]:
    width = max(map(len, ids))

    def pad(rows: list[torch.Tensor], fill: int) -> torch.Tensor:
        out = torch.full((len(rows), width), fill)
        for line, row in zip(out, rows, strict=True):
            line[slice(width - len(row), None) if side == "left" else slice(0, len(row))] = row
        return out

    ones = [torch.ones_like(row) for row in ids]
    return {
        "input_ids": pad(ids, PAD),
        "attention_mask": pad(ones, 0),
        "labels": pad(labels, -100),
    }


def prompts(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same batch without labels, for `generate`."""
    return {k: v for k, v in data.items() if k != "labels"}
