"""A checkpoint that knows how it was pruned: one folder with model, processor and pruner.

    adapter_model.safetensors or model.safetensors      weights, as PEFT or transformers write them
    pruner.json                                         config, calibration, prompt format, recipe
    pruner.safetensors                                  the method's own weights, where it has any

Only safetensors are read, and no code from the folder is run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from itprune.attach import Attached, attach, base_model
from itprune.calibration import Calibration
from itprune.config import PruneConfig
from itprune.inputs import bad_config, load_processor
from itprune.prompt import PromptFormat
from itprune.tower import strip
from itprune.trained import is_trained
from itprune.writing import replace_text

FORMAT = 1
PRUNER_FILE = "pruner.json"
PRUNER_WEIGHTS = "pruner.safetensors"
ADAPTER_FILE = "adapter_config.json"


@dataclass
class Loaded:
    """What a checkpoint folder holds, ready for inference."""

    model: nn.Module
    """The transformers model, PEFT-wrapped unless merged."""
    processor: ProcessorMixin
    attached: Attached | None
    """None: an ordinary model folder, running dense."""


@dataclass(frozen=True)
class PrunerRecord:
    """The contents of pruner.json."""

    config: PruneConfig
    prompt: PromptFormat
    calibration: Calibration | None = None
    recipe: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "prune": self.config.to_dict(),
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "prompt": self.prompt.to_dict(),
            "recipe": None if self.recipe is None else dict(self.recipe),
        }

    @classmethod
    def read(cls, folder: Path) -> PrunerRecord:
        """Raises ValueError when the file is missing, broken or of a newer format."""
        path = folder / PRUNER_FILE
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise ValueError(f"{folder}: no {PRUNER_FILE}, so this is not our checkpoint") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"{path}: written in a format this version does not know")
        missing = {"prune", "prompt", "calibration"} - values.keys()
        if missing:
            raise ValueError(f"{path}: has no {sorted(missing)[0]!r}; it is damaged")
        calibration = values["calibration"]
        return cls(
            PruneConfig.from_dict(values["prune"]),
            PromptFormat.from_dict(values["prompt"]),
            None if calibration is None else Calibration.from_dict(calibration),
            values.get("recipe"),
        )

    def write(self, folder: Path) -> None:
        """Replaces pruner.json in one step, so a crash leaves the old one."""
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / PRUNER_FILE, json.dumps(self.to_dict(), indent=1) + "\n")


def save_pruner(
    folder: str | Path,
    attached: Attached,
    recipe: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes what the pruner needs beside weights that somebody else (a Trainer) has saved.

    Args:
        folder: where they are.
        attached: the pruner.
        recipe: the run behind it.
        weights: the method's state dict, gathered, where several processes share it.
    """
    folder = Path(folder)
    record = PrunerRecord(attached.config, attached.prompt, attached.calibration, recipe)
    record.write(folder)
    weights = attached.method.state_dict() if weights is None else weights
    if weights:
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / PRUNER_WEIGHTS)


def save_pretrained(
    folder: str | Path,
    model: nn.Module,
    processor: ProcessorMixin,
    attached: Attached | None,
    recipe: Mapping[str, Any] | None = None,
) -> None:
    """Writes model (or adapter), processor and pruner to one folder.

    Raises:
        ValueError: not a transformers or PEFT model.
    """
    base_model(model)
    saver: Any = model
    saver.save_pretrained(folder)
    processor.save_pretrained(folder)
    if attached is not None:
        save_pruner(folder, attached, recipe)


def load_pretrained(
    folder: str | Path,
    *,
    keep: float | None = None,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    merge: bool = False,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    llm: bool = True,
) -> Loaded:
    """Loads a folder written by `save_pretrained`, or an ordinary model folder.

    Args:
        folder: checkpoint folder; an adapter's base model is looked for as its path says, from the
            working directory, then from the folder and its parents.
        keep: another target than the checkpoint's; 1.0 runs dense.
        method: another (training-free) method than the checkpoint's.
        options: that method's own options.
        merge: fold LoRA into the base weights.
        dtype: default float32 on a CPU, the checkpoint's own elsewhere.
        device: default CUDA where there is one.
        llm: False: only what makes visual tokens, and the token embeddings, which stay on the CPU
            in their own type; the language model is not read, unless adapters are merged into it.

    Raises:
        ValueError: a wrong folder, missing weights, an unknown family, method or option, a package
            that this model's processor needs.
    """
    folder = Path(folder)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    _check_folder(folder)
    processor = load_processor(folder)  # first: what it lacks is known before gigabytes are read
    wanted = dtype or (torch.float32 if device.type == "cpu" else "auto")
    if llm:
        model = load_model(folder, wanted, merge).to(device)
    else:  # opened in its own type, so that what is let go of is never read
        own = load_model(folder, "auto", merge=True)
        model = strip(own, device, wanted if isinstance(wanted, torch.dtype) else None)
    model.eval()
    record = _record(folder, processor, keep, method, options)
    attached = None
    if record is not None:
        attached = attach(
            model, record.config, prompt=record.prompt, calibration=record.calibration
        )
        _fill(attached, folder)
    return Loaded(model, processor, attached)


def _fill(attached: Attached, folder: Path) -> None:
    """Gives a method with trained parts the checkpoint's.

    Raises:
        ValueError: it has none for this method; untrained parts would answer nonsense.
    """
    if not is_trained(attached.method):
        return
    weights = folder / PRUNER_WEIGHTS
    name = attached.config.method
    if not weights.exists() or PrunerRecord.read(folder).config.method != name:
        attached.detach()
        raise ValueError(
            f"{folder}: method {name!r} has trained parts and this checkpoint "
            "holds none for it; tune one with it (prune.method in the recipe)"
        )
    attached.method.load_state_dict(load_file(weights))


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such checkpoint folder")
    if (folder / ADAPTER_FILE).exists():
        base_folder(folder)
    elif not (folder / "config.json").exists():
        raise ValueError(f"{folder}: holds neither config.json nor {ADAPTER_FILE}; not a model")


def load_model(folder: Path, dtype: torch.dtype | str, merge: bool) -> nn.Module:
    """A folder's model without its pruner, PEFT-wrapped unless merged.

    Raises:
        ValueError: weights are missing.
    """
    if not (folder / ADAPTER_FILE).exists():
        return load_base(folder, dtype)
    from peft import PeftModel  # slow to import, and needed only here

    model: Any = PeftModel.from_pretrained(load_base(base_folder(folder), dtype), str(folder))
    return model.merge_and_unload() if merge else model


def base_folder(folder: Path) -> str | Path:
    """Where an adapter's base model lies; a hub name when no such folder exists.

    Raises:
        ValueError: it names none, or one that is not there.
    """
    name = json.loads((folder / ADAPTER_FILE).read_text()).get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{folder / ADAPTER_FILE}: names no base model")
    for root in (Path(), folder.resolve(), *folder.resolve().parents):
        if (root / name / "config.json").exists():
            return root / name
    if Path(name).is_absolute() or name.startswith("."):
        raise ValueError(f"{folder}: its base model {name} is not there")
    return str(name)


def load_base(path: str | Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """The transformers model of a folder or hub name.

    Raises:
        ValueError: weights are missing, or config.json is wrong.
    """
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except StrictDataclassError as error:
        raise bad_config(path, error) from None
    if info["missing_keys"]:
        raise ValueError(f"{path}: weights are missing, e.g. {sorted(info['missing_keys'])[0]}")
    return model


def _record(
    folder: Path,
    processor: ProcessorMixin,
    keep: float | None,
    method: str | None,
    options: Mapping[str, Any] | None,
) -> PrunerRecord | None:
    """What to attach: the checkpoint's record, changed by the caller's wishes."""
    if (folder / PRUNER_FILE).exists():
        record = PrunerRecord.read(folder)
    elif keep is None and method is None:
        return None
    else:
        record = PrunerRecord(PruneConfig(), PromptFormat.from_processor(processor))
    config = record.config
    if method is not None and method != config.method:
        config = PruneConfig(method, config.final_keep, options=dict(options or {}))
        record = dataclasses.replace(record, config=config, calibration=None)
    elif options:
        config = config.replace(options={**config.options, **options})
    if keep is not None:
        config = config.replace(keep=keep)
    return dataclasses.replace(record, config=config)
