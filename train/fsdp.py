"""FSDP2 through accelerate: who asks for it, and that it really shards.

accelerate shards on accelerators only. For several processes on a CPU it takes the plugin, says
nothing and trains plain DDP. Here its own way is made open to the CPU, too, and whatever started, a
run that asked for FSDP2 and is not sharded ends with a sentence.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import DistributedType

from itprune.families import find_family
from train.launcher import Launch
from train.model import base_of
from train.recipe.arguments import find_file
from train.recipe.contradictions import BITS

VERSION = "2"


def fsdp_options(trainer: Mapping[str, Any], launch: Launch, mode: str) -> dict[str, Any]:
    """What the launch changes in the `trainer` section about FSDP.

    One process started by plain `python` has nothing to share and runs without, so that one recipe
    serves all launchers.

    Raises:
        ValueError: the first version of FSDP, FSDP beside DeepSpeed or named twice, mode router, an
            optimizer of bitsandbytes, or a file that is not there.
    """
    named = bool(trainer.get("fsdp"))
    if launch.accelerate_fsdp is None and not named:
        return {}
    if launch.accelerate_fsdp is not None and named:
        raise ValueError(
            "trainer.fsdp: accelerate's file already configures FSDP; name it in one place only"
        )
    config = trainer.get("fsdp_config") or {}
    if isinstance(config, str):
        config = _read(config)
    version = launch.accelerate_fsdp or str(config.get("version", VERSION))
    if version != VERSION:
        raise ValueError(
            f"FSDP version {version} cannot hold frozen and trained weights in one shard; set "
            "fsdp_version: 2 (launch/accelerate/fsdp2.yaml)"
        )
    if trainer.get("deepspeed") is not None and named:
        raise ValueError("trainer.fsdp: runs without trainer.deepspeed; remove one of them")
    if launch.processes == 1 and named:
        return {"fsdp": None, "fsdp_config": None}
    if mode == "router":
        raise ValueError(
            "model.mode: router trains beside the model's own forward, where FSDP adds up no "
            "gradients; use launch/accelerate/multi_gpu.yaml or DeepSpeed"
        )
    optimizer = str(trainer.get("optim", ""))
    if any(word in optimizer for word in BITS):
        raise ValueError(
            f"trainer.optim: {optimizer} is of bitsandbytes, which cannot step on weights that "
            "FSDP2 has sharded; use adamw_torch, or DeepSpeed"
        )
    return {"fsdp_config": dict(config)} if named else {}  # transformers adds to it


def _read(name: str) -> dict[str, Any]:
    path = find_file(name)
    if path is None:
        raise ValueError(f"trainer.fsdp_config: no such file: {name}")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"trainer.fsdp_config: {path} is not JSON ({error})") from None
    return config


def sharded_layers(model: Any) -> tuple[str, ...]:
    """Class names of the layers that are gathered one by one: the LLM's and the tower's.

    What transformers names for this is partly not in the model, which accelerate refuses.
    """
    family = find_family(base_of(model))
    return tuple(sorted({type(layer).__name__ for layer in (*family.layers, *family.blocks)}))


def open_to_cpu(args: Any) -> None:
    """Lets accelerate shard on a CPU: the state of this run is called what it shards for.

    Args:
        args: TrainingArguments of a run that asks for FSDP, before its Accelerator is made.
    """
    if args.distributed_state.distributed_type == DistributedType.MULTI_CPU:
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU


def set_plan(accelerator: Any, layers: Sequence[str]) -> None:
    """Tells accelerate what to gather one by one, unless its file does, and in which precision.

    In mixed precision weights are gathered in bfloat16, and gradients add up in float32 as they do
    under DDP. Inputs are left alone, since autocast casts what has to be: FSDP would copy the
    records that travel with a call, and what layers write there would be lost.

    Raises:
        ValueError: FSDP2 was asked for, and accelerate decided to train something else.
    """
    if not accelerator.is_fsdp2:
        kind = str(accelerator.distributed_type).rpartition(".")[2]
        raise ValueError(
            f"FSDP2 was asked for, but accelerate would train {kind} in which every process holds "
            "all weights; use launch/accelerate/fsdp2.yaml, or fsdp2_cpu2.yaml on a CPU"
        )
    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = list(layers)
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy,
            reduce_dtype=torch.float32,
            output_dtype=None,
            cast_forward_inputs=False,
        )
