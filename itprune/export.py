"""From any checkpoint of a run to one ordinary model folder.

    adapters            merged into their base, which is read unquantised
    a whole model       as it is
    shards only         ZeRO-1/2/3 and FSDP, put together first

What comes out has safetensors under the names transformers or vLLM gives the model, the processor,
and pruner.json where there is one; nothing in it needs our code, DeepSpeed or PEFT.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from itprune.checkpoint import (
    ADAPTER_FILE,
    PRUNER_FILE,
    PRUNER_WEIGHTS,
    base_folder,
    load_base,
    load_model,
    load_pretrained,
)
from itprune.shards import has_shards, read_shards
from itprune.trained import NAME
from itprune.vllm.folder import check_type, rename

TRANSFORMERS, VLLM = READERS = ("transformers", "vllm")
"""Whom a folder is for."""
ADAPTER = "default"
"""PEFT's name for the only adapter."""
RECIPE_FILE = "recipe.yaml"
GENERATION_FILE = "generation_config.json"


def check_reader(folder: Path, to: str) -> None:
    """Refuses a family that a reader is not known to read, before gigabytes are.

    Args:
        folder: any checkpoint of ours, or an ordinary model folder.
        to: one of `READERS`.

    Raises:
        ValueError: in one sentence.
    """
    if to == VLLM:
        whole = base_folder(folder) if (folder / ADAPTER_FILE).exists() else folder
        check_type(AutoConfig.from_pretrained(whole).model_type)


def read_model(
    folder: Path, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The whole model of a checkpoint, adapters merged, without its pruner.

    Args:
        folder: any checkpoint of ours, or an ordinary model folder.
        dtype: of the weights; None: the base's own. Adapters are merged in float32 and rounded
            once where a type is named.

    Returns:
        The model, on the CPU, and the pruner's trained parts where only the shards hold them.

    Raises:
        ValueError: weights are missing or cannot be read.
    """
    merging = "auto" if dtype is None else torch.float32
    adapter = (folder / ADAPTER_FILE).exists()
    parts: dict[str, Tensor] = {}
    if has_weights(folder):
        model: Any = load_model(folder, merging if adapter else dtype or "auto", merge=True)
        state = model.state_dict()
    elif has_shards(folder):
        state, parts = _without_pruner(read_shards(folder))
        if adapter:
            model = _with_adapters(folder, state, merging)
            state = model.state_dict()
        else:
            model = _empty(AutoConfig.from_pretrained(folder), _generation(folder))
            state |= _frozen(folder, model, state)
    else:
        raise ValueError(f"{folder}: holds neither weights (*.safetensors) nor shards of them")
    # Saved is not the model that was loaded: transformers would write the names of the files it
    # came from, and those that ZeRO-3 gathers have names of their own.
    return _filled(_empty(model.config, model.generation_config), state, dtype), parts


def has_weights(folder: Path) -> bool:
    """Whether safetensors with the model or its adapters lie in a folder: DeepSpeed runs of other
    trainers leave a file without a tensor beside the shards."""
    kind = "adapter_model" if (folder / ADAPTER_FILE).exists() else "model"
    for path in folder.glob(f"{kind}*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if len(file.keys()):
                return True
    return False


def write_model(
    folder: Path,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    source: Path | None = None,
    parts: Mapping[str, Tensor] | None = None,
    max_shard_size: str | None = None,
    to: str = TRANSFORMERS,
) -> None:
    """Writes an ordinary model folder and reads it back.

    Args:
        folder: a new one.
        model: whole, without adapters.
        processor: goes beside it.
        source: the checkpoint whose pruner goes beside it; None: the folder has none.
        parts: the pruner's trained parts where `source` itself has no file of them.
        max_shard_size: of a file, such as 5GB; None: as transformers has it.
        to: one of `READERS`: whose names the weights get.

    Raises:
        ValueError: what was written is not what is in memory, or a family that this reader is not
            known to read.
    """
    options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(folder, **options)
    processor.save_pretrained(folder)
    if source is not None:
        for name in (PRUNER_FILE, PRUNER_WEIGHTS):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if parts and not (folder / PRUNER_WEIGHTS).exists():
            save_file({k: v.contiguous() for k, v in parts.items()}, folder / PRUNER_WEIGHTS)
    if to == VLLM:
        rename(folder, model.config.model_type)
    _check(folder, model)


def _check(folder: Path, model: PreTrainedModel) -> None:
    """Every weight on disk against the one in memory; the pruner is attached, too."""
    dtype = next(model.parameters()).dtype
    read: Any = load_pretrained(folder, dtype=dtype, device="cpu").model
    found = read.state_dict()
    for name, value in model.state_dict().items():
        if name not in found or not torch.equal(found[name].float(), value.float()):
            raise ValueError(f"{folder}: {name} reads back otherwise than it was written")


# ---------------------------------------------------------------------------------- from shards
def _without_pruner(
    state: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Divides weights into the model's and the pruner's, these under its own names."""
    model, parts = {}, {}
    for name, value in state.items():
        words = name.split(".")
        if NAME not in words:
            model[name] = value
            continue
        inner = words[words.index(NAME) + 1 :]
        if inner[:2] == ["modules_to_save", ADAPTER]:
            inner = inner[2:]
        parts[".".join(inner)] = value
    return model, parts


def _with_adapters(
    folder: Path, state: Mapping[str, Tensor], dtype: torch.dtype | str
) -> PreTrainedModel:
    """The base with the adapters of the shards merged; what was frozen is the base's."""
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    config.modules_to_save = [m for m in config.modules_to_save or [] if m != NAME] or None
    model: Any = get_peft_model(load_base(base_folder(folder), dtype), config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        value = state.get(name, state.get(_plain(name)))
        if value is None or value.shape != parameter.shape:
            raise ValueError(f"{folder}: its shards hold no fitting weight for {name}")
        parameter.data.copy_(value)
    return model.merge_and_unload()


def _plain(name: str) -> str:
    """A trained weight as PEFT's files call it: without the adapter's name."""
    saved = name.replace(f".modules_to_save.{ADAPTER}.", ".")
    return saved.replace(f".{ADAPTER}.", ".")


def _empty(config: Any, generation: GenerationConfig | None) -> PreTrainedModel:
    """A model without memory for its weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
    if generation is not None:
        model.generation_config = generation
    return model


def _generation(folder: Path) -> GenerationConfig | None:
    known = (folder / GENERATION_FILE).is_file()
    return GenerationConfig.from_pretrained(folder) if known else None


def _filled(
    model: PreTrainedModel, state: Mapping[str, Tensor], dtype: torch.dtype | None
) -> PreTrainedModel:
    """An empty model with weights, of a type or of their own one."""
    cast = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in state.items()}
    model.load_state_dict(cast, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def _frozen(folder: Path, model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights no shard holds: they did not train, so they are those of the run's base.

    Raises:
        ValueError: nobody knows the base, or it has no such weights either.
    """
    tied = set(model.all_tied_weights_keys)
    missing = [name for name in model.state_dict() if name not in state and name not in tied]
    if not missing:
        return {}
    recipe = folder / RECIPE_FILE
    named = yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else {}
    base = named.get("model", {}).get("path")
    lacking = f"{folder}: {len(missing)} weights that did not train are not in its shards, such as "
    if not base:
        raise ValueError(f"{lacking}{missing[0]}, and no {RECIPE_FILE} names the base they are of")
    held = load_base(base, "auto").state_dict()
    for name in missing:
        if name not in held:
            raise ValueError(f"{lacking}{name}, nor in its base {base}")
    warnings.warn(f"{lacking}{missing[0]}; they are taken from {base}", stacklevel=2)
    return {name: held[name] for name in missing}
