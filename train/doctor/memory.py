"""How much memory one process of a run will take, told from the model's shape alone.

Exact are weights, gradients and optimizer states: every parameter of the model as it will train is
counted, on the meta device. The rest is an estimate, within some 15 % of what autograd keeps of a
LLaMA layer, written out in `layer_bytes` and below. Attention is never a matrix (SDPA, flash).

    activations  without gradient checkpointing what every layer keeps of its tokens for backward;
                 with it the input of every layer, and one layer whole
    casts        bf16 copies that autocast makes of fp32 weights
    head         14 bytes a logit: the logits, their fp32 copy, its softmax and its gradient
    vision       twice the outputs of a block's linear layers, a patch: of one block at work where
                 the tower is frozen, of all where it trains

What is in none of them (CUDA's context, communication buffers, fragments) is `OVERHEAD`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from itprune.families import find_family
from train.model import base_of
from train.recipe.arguments import find_file
from train.recipe.config import Recipe

GB = 1 << 30
OVERHEAD = GB
"""Bytes of a process that no tensor of the run takes."""
PER_LOGIT = 14
BLOCK = 64
"""Weights that share one quantisation constant (bitsandbytes, 4 bits)."""
BLOCK_8BIT = 256
SMALL = 4096
"""Weights of fewer elements keep 32-bit optimizer states."""
STATES = {
    "adamw": 2, "adam": 2, "ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0,
    "adalomo": 0, "lomo": 0,
}  # fmt: skip
"""Numbers an optimizer keeps for each weight, by the start of its name."""


@dataclass(frozen=True)
class Setup:
    """What of a run memory depends on, beside the model and its batches."""

    processes: int = 1
    zero: int = 0
    """DeepSpeed's stage; FSDP2 shards what stage 3 does."""
    deepspeed: bool = False
    offload_optimizer: bool = False
    offload_weights: bool = False
    bf16: bool = False
    optim: str = "adamw_torch"
    checkpointing: bool = False

    @classmethod
    def of(cls, recipe: Recipe, processes: int) -> Setup:
        """Of a recipe under `processes` processes, as `itprune train` starts them."""
        trainer = recipe.trainer
        named = trainer.get("deepspeed") if processes > 1 else None
        config = _deepspeed(named)
        zero = config.get("zero_optimization", {})
        fsdp = bool(trainer.get("fsdp")) and processes > 1
        return cls(
            processes=processes,
            zero=3 if fsdp else int(zero.get("stage", 0)),
            deepspeed=bool(config),
            offload_optimizer=_offloads(zero, "offload_optimizer"),
            offload_weights=_offloads(zero, "offload_param"),
            bf16=bool(trainer.get("bf16")),
            optim=str(trainer.get("optim", cls.optim)),
            checkpointing=any(
                bool(trainer.get(f"{kind}_checkpointing")) for kind in ("gradient", "activation")
            ),
        )


@dataclass(frozen=True)
class Load:
    """The largest batch of one process."""

    tokens_in: int
    """That enter the LLM, padding included."""
    tokens: int
    """On average over its layers."""
    logits: int
    """Positions the head is asked for."""
    patches: int
    """Of all its images."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Of the decoder."""
    casts: int
    head: int
    vision: int
    gathered: int
    """Weights that a sharded run puts together for the layers at work."""
    offloaded: int
    """In the machine's own memory instead."""
    overhead: int = OVERHEAD

    @property
    def total(self) -> int:
        """On the device."""
        return sum(n for name, n in vars(self).items() if name != "offloaded")

    def to_dict(self) -> dict[str, int]:
        """Plain JSON."""
        return {**vars(self), "total": self.total}


def estimate(model: Any, setup: Setup, load: Load, four_bit: set[str]) -> Memory:
    """The memory of one process.

    Args:
        model: as it will train, on the meta device.
        setup: the run.
        load: its largest batch.
        four_bit: names of the weights that are stored in 4 bits.
    """
    weights = gradients = optimizer = 0
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        size = 2 if setup.deepspeed and setup.bf16 else parameter.element_size()
        weights += four_bit_bytes(count) if name in four_bit else count * size
        if parameter.requires_grad:
            gradients += count * size
            # DeepSpeed steps on fp32 copies of its own, whatever the weights' type is.
            kept = 4 if setup.deepspeed else size
            optimizer += state_bytes(setup.optim, parameter, kept, "embed" in name)
            optimizer += 4 * count if setup.deepspeed else 0
    n = setup.processes
    if setup.zero >= 3:
        weights = -(-weights // n)
    if setup.zero >= 2:
        gradients = -(-gradients // n)
    elif n > 1 and not setup.deepspeed:
        gradients *= 2  # DDP reduces in buckets beside them
    if setup.zero >= 1:
        optimizer = -(-optimizer // n)
    offloaded = (optimizer if setup.offload_optimizer else 0) + (
        weights if setup.offload_weights else 0
    )
    return Memory(
        weights=0 if setup.offload_weights else weights,
        gradients=gradients,
        optimizer=0 if setup.offload_optimizer else optimizer,
        **_working(model, setup, load),
        offloaded=offloaded,
    )


def four_bit_bytes(count: int, double: bool = True) -> int:
    """A weight in 4 bits with its constants: an fp32 number for each block, or with double
    quantisation a byte, and an fp32 number for 256 of these."""
    blocks = -(-count // BLOCK)
    constants = blocks + 4 * -(-blocks // BLOCK_8BIT) if double else 4 * blocks
    return -(-count // 2) + constants


def state_bytes(optim: str, weight: nn.Parameter, size: int, embedding: bool) -> int:
    """What an optimizer keeps for one weight; an unknown one is taken for AdamW.

    Args:
        optim: its name, as in `trainer.optim`.
        weight: what it steps.
        size: bytes of a number of the weight it steps.
        embedding: bitsandbytes keeps the states of embeddings in 32 bits.
    """
    name, count = optim.removeprefix("paged_"), weight.numel()
    if name.startswith("adafactor"):  # a row and a column of numbers for a matrix
        shape = weight.shape
        return 4 * (sum(shape[-2:]) * shape[:-2].numel() if len(shape) > 1 else count)
    states = next((n for start, n in STATES.items() if name.startswith(start)), 2)
    if "8bit" in name:
        if embedding or count < SMALL:
            return 4 * states * count
        return states * (count + 4 * -(-count // BLOCK_8BIT))
    return states * count * (4 if "bnb" in name or optim.startswith("paged") else size)


# --------------------------------------------------------------------------------- activations
def _working(model: Any, setup: Setup, load: Load) -> dict[str, int]:
    base = base_of(model)
    family = find_family(base)
    size = 2 if setup.bf16 else next(family.text_model.parameters()).element_size()
    residual = max(size, _residual(family, setup))
    width = family.host.width
    layers = [layer_bytes(family, layer, size, residual) for layer in family.layers]
    if setup.checkpointing:
        activations = load.tokens * len(layers) * width * residual
        activations += load.tokens_in * max(layers)
    else:
        activations = load.tokens * sum(layers)
    tower = sum(p.requires_grad for p in family.tower.parameters()) > 0
    blocks = len(family.blocks) if tower and not setup.checkpointing else 1
    outputs = sum(linear.out_features for _, linear in _named(family.blocks[0]))
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in family.layers)
    return {
        "activations": activations,
        "casts": _casts(model, setup),
        "head": load.logits * base.get_output_embeddings().out_features * PER_LOGIT,
        "vision": load.patches * 2 * outputs * size * blocks,
        # One layer at work and the next one fetched.
        "gathered": 2 * largest * size if setup.zero >= 3 else 0,
    }


def _residual(family: Any, setup: Setup) -> int:
    """Bytes of a number on the residual stream, which has the type of the embeddings."""
    if setup.deepspeed and setup.bf16:
        return 2
    weight: torch.Tensor = family.text_model.get_input_embeddings().weight
    return weight.element_size()


def _casts(model: Any, setup: Setup) -> int:
    """Autocast keeps copies of what trains for a whole forward, and backward all it will use."""
    if not setup.bf16 or setup.deepspeed:
        return 0
    weights = [linear.weight for linear in model.modules() if isinstance(linear, nn.Linear)]
    wide = [w for w in weights if w.dtype == torch.float32]
    return sum(2 * w.numel() for w in wide if w.requires_grad or not setup.checkpointing)


def layer_bytes(family: Any, layer: nn.Module, size: int, residual: int) -> int:
    """Bytes a decoder layer keeps of a token for backward.

    Both inputs of its norms, their fp32 copies and results; q, k, v, what attention makes of them,
    and a copy of that in order; of the feed-forward block the outputs of its first layers, the
    activation and the product. A residual stream wider than what layers compute in is copied for
    each layer that reads it.

    Args:
        family: of the model.
        layer: of its decoder.
        size: bytes of a number the layers compute in.
        residual: of one on the residual stream.
    """
    attention, block = family.attention(layer), family.feed_forward(layer)
    names = block.first if block is not None else ()
    inside = _named(block.module if block is not None else layer)
    first = [linear for name, linear in inside if name.split(".")[0] in names]
    around = [linear for _, linear in _named(attention)]
    width: int = family.host.width
    kept = 2 * width * (residual + 4 + size) + width * size
    kept += size * sum(linear.out_features for linear in around)
    kept += 2 * size * sum(linear.out_features for linear in first)
    if residual > size:
        kept += width * size * max(len(around) - 1 + len(first) - 2, 0)
    return kept


def _named(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Linear layers, adapters left out."""
    found = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    return [(n, m) for n, m in found if not any(w.startswith("lora_") for w in n.split("."))]


# ----------------------------------------------------------------------------------- DeepSpeed
def _deepspeed(named: str | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The values of `trainer.deepspeed`; none where it is not used.

    Raises:
        ValueError: the file is missing or not JSON.
    """
    if named is None or isinstance(named, Mapping):
        return named or {}
    path = find_file(named)
    if path is None:
        raise ValueError(f"trainer.deepspeed: no such file: {named}")
    try:
        values: Mapping[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"trainer.deepspeed: {path}: not valid JSON ({error})") from None
    return values


def _offloads(zero: Mapping[str, Any], what: str) -> bool:
    return bool((zero.get(what) or {}).get("device", "none") != "none")


def four_bit_names(model: Any) -> set[str]:
    """Names of the weights mode `qlora` stores in 4 bits: the decoder's linear layers."""
    decoder = find_family(base_of(model)).text_model
    inside = {id(linear.weight) for _, linear in _named(decoder)}
    return {name for name, p in model.named_parameters() if id(p) in inside}


def dtype_of(recipe: Recipe) -> torch.dtype:
    """The type base weights are loaded in."""
    low = bool(recipe.trainer.get("bf16")) and recipe.mode != "full"
    if recipe.model.dtype == "auto":
        return torch.bfloat16 if low else torch.float32
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return types[recipe.model.dtype]
