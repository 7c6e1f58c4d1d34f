"""Shapes: LLaVA models with random weights, and inputs whose CLS curves have long tails.

Random weights are enough to measure time, but a random tower looks at all patches alike, so every
image would keep the same number of tokens. Two things give the counts of real pictures, which
differ by a factor of three or so: the projections of q and k in the block that scores are scaled
up, and image i is one texture repeated in every patch plus a share of independent noise per patch;
the larger the share, the longer the tail of its curve and the fewer tokens it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedModel,
)

from itprune.attach import base_model
from itprune.families import find_family
from itprune.options import check_choice

CURVE_GAIN = 40.0
"""Factor on the attention logits of the block that scores."""
NOISE_SHARES = (0.02, 0.8)
"""Share of noise in the first and the last image of a batch."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of one row of its input."""

    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_ffn: int
    image_size: int
    patch: int
    width: int
    layers: int
    heads: int
    ffn: int
    vocab: int
    text: int = 64
    """Text tokens of a row, the first one included."""
    supervised: int = 32
    """Text tokens at the end of a row that carry labels."""
    lora: bool = False
    """Train LoRA in bf16 with gradient checkpointing; else all but the tower in fp32."""
    gpu_gib: int = 0
    """Memory of a CUDA GPU this needs; 0: runs anywhere."""

    @property
    def visual(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.gpu_gib else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.gpu_gib else torch.float32

    @property
    def half_depth(self) -> int:
        """The layer after which half of the layers are left: where the second stage acts."""
        return self.layers // 2 - 1


SHAPES = {
    "tiny": Shape(
        vision_width=32,
        vision_layers=3,
        vision_heads=4,
        vision_ffn=64,
        image_size=32,
        patch=4,
        width=32,
        layers=4,
        heads=4,
        ffn=64,
        vocab=320,
        text=16,
        supervised=6,
    ),
    "cpu": Shape(
        vision_width=256,
        vision_layers=6,
        vision_heads=4,
        vision_ffn=1024,
        image_size=336,
        patch=14,
        width=512,
        layers=8,
        heads=8,
        ffn=1408,
        vocab=16000,
    ),
    "llava-1.5-7b": Shape(
        vision_width=1024,
        vision_layers=24,
        vision_heads=16,
        vision_ffn=4096,
        image_size=336,
        patch=14,
        width=4096,
        layers=32,
        heads=32,
        ffn=11008,
        vocab=32064,
        lora=True,
        gpu_gib=40,
    ),
}


def find_shape(name: str) -> Shape:
    """The shape of a name, if this machine can run it.

    Raises:
        ValueError: an unknown name, or a machine too small for it.
    """
    check_choice("--shape", name, SHAPES)
    shape = SHAPES[name]
    if shape.gpu_gib:
        have = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
        if have < shape.gpu_gib * 2**30:
            found = f"the one here has {have / 2**30:.0f}" if have else "none was found"
            raise ValueError(
                f"--shape {name} needs a CUDA GPU with {shape.gpu_gib} GiB of memory and "
                f"{found}; use --shape cpu here"
            )
    return shape


def build_model(shape: Shape, training: bool) -> nn.Module:
    """A LLaVA of this shape with random weights, always the same ones; tower frozen."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.vision_width,
            intermediate_size=shape.vision_ffn,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=shape.vision_heads,
            image_size=shape.image_size,
            patch_size=shape.patch,
        ),
        text_config=LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.width,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=4096,
        ),
        image_token_id=shape.vocab - 1,
    )
    with shape.device:
        model = AutoModelForImageTextToText.from_config(
            config, dtype=shape.dtype, attn_implementation="sdpa"
        )
    _bend_curves(model)
    if not training:
        return model.eval()
    find_family(model).tower.requires_grad_(False)
    model = _with_lora(model) if shape.lora else model
    set_train_mode(model)
    return model


def set_train_mode(model: nn.Module) -> None:
    """Training mode for all but the frozen tower."""
    model.train()
    find_family(base_model(model)).tower.eval()


@torch.no_grad()
def _bend_curves(model: PreTrainedModel) -> None:
    """Makes the scoring attention steep."""
    family = find_family(model)
    attention: Any = family.block_attention(family.blocks[family.feature_block])
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.mul_(CURVE_GAIN**0.5)


def _with_lora(model: PreTrainedModel) -> nn.Module:
    """LLaVA-1.5's recipe: rank 128 on every linear layer of the language model."""
    targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    wrapped = get_peft_model(model, LoraConfig(r=128, lora_alpha=256, target_modules=targets))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # transformers now makes the input of the frozen tower require a gradient, too: its whole
    # activations would be kept for a backward pass nobody needs.
    model.disable_input_require_grads()
    return wrapped


def make_batch(shape: Shape, batch: int, labels: bool) -> dict[str, Tensor]:
    """One image, then text, in every row; the last tokens are supervised."""
    generator = torch.Generator().manual_seed(0)
    image = torch.full((batch, shape.visual), shape.vocab - 1)
    text = torch.randint(3, shape.vocab - 1, (batch, shape.text - 1), generator=generator)
    ids = torch.cat([torch.ones(batch, 1, dtype=torch.long), image, text], 1)
    out = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _images(shape, batch, generator).to(shape.dtype),
    }
    if labels:
        out["labels"] = ids.clone()
        out["labels"][:, : -shape.supervised] = -100
    return {name: value.to(shape.device) for name, value in out.items()}


def _images(shape: Shape, batch: int, generator: torch.Generator) -> Tensor:
    side = shape.image_size // shape.patch
    low, high = NOISE_SHARES
    share = (torch.arange(batch) + 0.5) / batch * (high - low) + low
    share = share[:, None, None, None]
    texture = torch.randn(batch, 3, shape.patch, shape.patch, generator=generator)
    noise = torch.randn(batch, 3, shape.image_size, shape.image_size, generator=generator)
    return (1 - share).sqrt() * texture.repeat(1, 1, side, side) + share.sqrt() * noise
