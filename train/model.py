"""The model that trains: base weights, what is frozen, adapters.

Safetensors only, no code from a checkpoint is ever run. A model has three parts, which its family
tells apart: `vision` (the encoder), `language` (decoder and head) and `projector` (what lies
between, newline vectors included). A method with trained parts adds a fourth, `pruner`, when it is
attached.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from itprune import inputs
from itprune.families import find_family
from train.quant import keep_layout, quantization
from train.recipe.arguments import on_cpu
from train.recipe.config import Recipe
from train.recipe.sections import PARTS, LoraSection, QuantSection

PRUNER = "pruner"
"""Name of the attached method inside the model, and of its part."""


def load_processor(path: str) -> Any:
    """The processor of the base model.

    Raises:
        ValueError: there is none, or it needs a package that is not installed.
    """
    try:
        return inputs.load_processor(path)
    except ValueError as error:
        raise ValueError(f"model.path: {error}") from None


def load_model(recipe: Recipe, bf16: bool, sharded: bool = False) -> Any:
    """The base model with adapters and freezing applied; on the CPU, in 4 bits where it will train.

    Args:
        recipe: its `model`, `lora` and `quant` sections.
        bf16: whether training runs in bfloat16 (`model.dtype: auto` follows it).
        sharded: whether FSDP will divide the weights.

    Raises:
        ValueError: the weights cannot be loaded or are not complete.
    """
    section = recipe.model
    low = bf16 and recipe.mode != "full"
    auto = torch.bfloat16 if low else torch.float32
    dtype = auto if section.dtype == "auto" else _dtype(section.dtype)
    if recipe.mode == "qlora":
        quant = quantization(recipe.quant or QuantSection(), section.path, dtype, sharded)
        # Left alone, weights in 4 bits go to a GPU that there is, even in a run on the CPU.
        away = on_cpu(recipe.trainer) and not is_deepspeed_zero3_enabled()
        model = _load(
            section.path,
            dtype,
            section.attn_implementation,
            quantization_config=quant,
            device_map={"": "cpu"} if away else None,
        )
        keep_layout(model)
    else:
        model = _load(section.path, dtype, section.attn_implementation)
    return prepare(model, recipe)


def prepare(model: Any, recipe: Recipe) -> Any:
    """Adapters and freezing applied to a base model, which may be one without weights."""
    model.config.use_cache = False
    if recipe.lora is not None:
        # Under ZeRO-3 loading draws random numbers; adapters must start the same without it.
        set_seed(recipe.trainer.get("seed", 42))
        model = add_lora(model, recipe.lora)
    else:
        trained, parts = _trained_parts(recipe), parts_of(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parts[name] in trained)
    widen_trained(model, recipe.model.dtype)
    return model


def load_whole(model: Any, folder: str) -> None:
    """Fills a model with the weights of a checkpoint of itself, whatever names its file uses.

    What no file of weights holds, the pruner, stays as it is.

    Raises:
        ValueError: weights are missing.
    """
    # float32 holds bfloat16 exactly, so frozen and trained weights come back as they were.
    saved = _load(folder, torch.float32, None).state_dict()
    model.load_state_dict(saved, strict=False)


def widen_trained(module: nn.Module, dtype: str) -> None:
    """Makes what trains float32 where `model.dtype` is auto; ZeRO-3 keeps float32 copies itself."""
    if dtype != "auto" or is_deepspeed_zero3_enabled():
        return
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def check_trains(model: nn.Module) -> None:
    """Raises ValueError when nothing would train."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model.freeze: every part is frozen, nothing would train")


def add_lora(model: Any, section: LoraSection) -> Any:
    """Wraps the model with adapters on its language model."""
    from peft import LoraConfig, get_peft_model

    decoder = _name_of(model, find_family(model).text_model)
    targets = "|".join(re.escape(name) for name in section.target)
    saved = list(section.modules_to_save)
    if section.train_projector:
        saved += [name for name in projector_names(model) if name not in saved]
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=rf"{re.escape(decoder)}\.(.*\.)?({targets})",
        modules_to_save=saved or None,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"lora: {_first_line(error)}") from None


def projector_names(model: Any) -> list[str]:
    """Names of the modules between vision and language; a list of modules by its members."""
    names = []
    for module in find_family(model).projectors:
        members = module if isinstance(module, nn.ModuleList) else [module]
        names += [_name_of(model, member) for member in members]
    return names


def parts_of(model: Any) -> dict[str, str]:
    """The part of every parameter of an unwrapped model, by its name."""
    family = find_family(model)
    owners = {
        "vision": [family.tower],
        "language": [family.text_model, model.get_output_embeddings()],
        "projector": family.projectors,  # last: some stand inside the encoder
    }
    found = {
        id(parameter): part
        for part, modules in owners.items()
        for module in modules
        for parameter in module.parameters()
    }
    return {
        name: PRUNER if name.startswith(f"{PRUNER}.") else found.get(id(parameter), "projector")
        for name, parameter in model.named_parameters()
    }


def trains_images(model: Any) -> bool:
    """Whether a weight that only images reach is trained."""
    base = base_of(model)
    decoder = find_family(base).text_model
    text = [*decoder.parameters(), *base.get_output_embeddings().parameters()]
    reached = {id(parameter) for parameter in text}
    return any(p.requires_grad and id(p) not in reached for p in model.parameters())


def limit_input_grads(model: Any, reentrant: bool) -> None:
    """Undoes what transformers prepares for gradient checkpointing where nothing needs it.

    It makes the inputs of every sub-model require a gradient. Only reentrant checkpointing needs
    that, and only where something trains; a frozen tower would be trained through for nothing.
    """
    base = base_of(model)
    base.disable_input_require_grads()
    family = find_family(base)
    for part in (family.tower, family.text_model):
        if reentrant and any(p.requires_grad for p in part.parameters()):
            part.enable_input_require_grads()


def base_of(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def _load(path: str, dtype: torch.dtype, attention: str | None, **options: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    if Path(path).is_absolute() and not Path(path).is_dir():
        raise ValueError(f"model.path: no such folder: {path}")
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"model.path: {path}: {_first_line(error)}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"model.path: {path}: {len(missing)} weights are missing from its files, the first is "
            f"{missing[0]}"
        )
    return model


def _trained_parts(recipe: Recipe) -> tuple[str, ...]:
    """Of the model itself; what a method brings trains unless it is frozen by name."""
    if recipe.mode != "full":
        return ("projector",) if recipe.mode == "projector" else ()
    return tuple(part for part in PARTS if part not in recipe.model.freeze)


def _name_of(model: nn.Module, module: nn.Module) -> str:
    names: dict[nn.Module, str] = {found: name for name, found in model.named_modules()}
    return names[module]


def _dtype(name: str) -> torch.dtype:
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return types[name]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
