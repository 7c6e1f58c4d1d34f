"""Shapes: the models a bench can run, with random weights, and their inputs.

`SHAPES` is the list; `build_model` and `make_batch` turn one into a model and a batch. How the
sizes of those with `-like` in their name were chosen is told in docs/benchmarks.md.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from itprune.attach import base_model
from itprune.bench.llava_shapes import LlavaNextShape, LlavaShape
from itprune.bench.qwen_shapes import QwenShape
from itprune.bench.shape import FIRST_ID, Shape
from itprune.families import find_family
from itprune.options import check_choice

QWEN_7B = QwenShape(
    vision_width=160,
    vision_layers=8,
    vision_heads=2,
    vision_ffn=428,
    patch=4,
    window=32,
    full_blocks=(7,),
    grids=((42, 48), (56, 36), (36, 56), (48, 42)),
    width=448,
    layers=10,
    heads=7,
    kv_heads=1,
    ffn=2368,
    vocab=9600,
    batch=2,
    curve_gain=160.0,
)
"""Tower and language model share the work as in Qwen2.5-VL-7B."""

SHAPES: dict[str, Shape] = {
    "tiny": LlavaShape(
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
    "cpu": LlavaShape(
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
    "next-like": LlavaNextShape(
        vision_width=128,
        vision_layers=6,
        vision_heads=2,
        vision_ffn=512,
        image_size=336,
        patch=14,
        tiles=2,
        mosaic=(36, 48),
        width=512,
        layers=8,
        heads=8,
        ffn=1376,
        vocab=4000,
        batch=2,
    ),
    "qwen2.5-vl-like": QWEN_7B,
    "qwen2.5-vl-32b-like": replace(QWEN_7B, vision_width=64, vision_heads=1, vision_ffn=172),
    "llava-1.5-7b": LlavaShape(
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
    """A model of this shape with random weights, always the same ones; tower frozen."""
    torch.manual_seed(0)
    with shape.device:
        model = AutoModelForImageTextToText.from_config(
            shape.config(), dtype=shape.dtype, attn_implementation="sdpa"
        )
    _bend_curves(model, shape)
    if not training:
        return model.eval()
    family = find_family(model)
    family.tower.requires_grad_(False)
    for projector in family.projectors:  # some towers hold theirs
        projector.requires_grad_(True)
    model = _with_lora(model) if shape.lora else model
    set_train_mode(model)
    return model


def set_train_mode(model: nn.Module) -> None:
    """Training mode for all but the frozen tower."""
    model.train()
    find_family(base_model(model)).tower.eval()


@torch.no_grad()
def _bend_curves(model: PreTrainedModel, shape: Shape) -> None:
    """Makes the scoring attention steep."""
    family = find_family(model)
    attention = family.block_attention(family.blocks[family.feature_block])
    for weight in shape.query_key(attention):
        weight.mul_(shape.curve_gain**0.5)


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
    first = torch.full((batch, 1), FIRST_ID)
    image = torch.full((batch, shape.visual), shape.image_id)
    text = torch.randint(*shape.words, (batch, shape.text - 1), generator=generator)
    ids = torch.cat([first, image, text], 1)
    out = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **shape.marks(ids),
        **shape.images(batch, generator),
    }
    out["pixel_values"] = out["pixel_values"].to(shape.dtype)
    if labels:
        out["labels"] = ids.clone()
        out["labels"][:, : -shape.supervised] = -100
    return {name: value.to(shape.device) for name, value in out.items()}
