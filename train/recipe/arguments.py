"""The `trainer` section: transformers' TrainingArguments, names unchanged, checked before the run.

`check_trainer` works on names and types alone, so a recipe is validated without a device;
`training_arguments` adds the defaults that this project needs and builds the real object.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Mapping
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIXED = {
    "remove_unused_columns": "the collator already makes exactly what the model takes",
    "label_names": "labels are always called `labels`",
    "resume_from_checkpoint": "use --resume",
    "local_rank": "the launcher sets it",
    "hub_token": "recipes are written down; log in with `hf auth login`, or set HF_TOKEN",
}
RENAMED = {"gradient_checkpointing": "activation_checkpointing"}
RENAMED |= {f"{old}_kwargs": f"{new}_kwargs" for old, new in RENAMED.items()}

UNFUSED = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""Liger's rope, norms and feed-forward blocks, but the host's loss: its own replaces the whole
model's forward, and with it the head that runs on supervised positions alone."""
EXPONENT = re.compile(r"[-+]?[\d.]+e[-+]?\d+$", re.IGNORECASE)
"""A number that YAML 1.1 leaves as text."""


@functools.cache
def _types() -> dict[str, Any]:
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return {f.name: hints[f.name] for f in dataclasses.fields(TrainingArguments) if f.init}


def check_trainer(values: Mapping[str, Any]) -> dict[str, Any]:
    """Names and types of the section; numbers written as 1e-4 become numbers.

    Raises:
        ValueError: unknown name (with the nearest valid one) or a value of the wrong type.
    """
    known = _types()
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name in FIXED:
            raise ValueError(f"trainer.{name}: is not an option here: {FIXED[name]}")
        if name not in known:
            close = difflib.get_close_matches(name, known.keys() - FIXED.keys(), n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see transformers.TrainingArguments"
            raise ValueError(f"trainer.{name}: unknown option {name!r}; {hint}")
        if value is False and name.endswith("_strategy"):
            value = "no"  # YAML 1.1 reads an unquoted `no` as false
        kind = known[name] | bool if name == "fsdp" else known[name]  # declared as text still
        checked[name] = _convert(f"trainer.{name}", value, kind)
    return checked


def _convert(where: str, value: Any, kind: Any) -> Any:
    members = _members(kind)
    if value is None and type(None) in members:
        return None
    if isinstance(value, str) and str not in members:
        value = _number(value)
    if isinstance(value, dict):
        value = {k: _number(v) if EXPONENT.match(str(v)) else v for k, v in value.items()}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and float in members:
        return value
    if number and int in members and float(value).is_integer():
        return int(value)
    if type(value) in members:
        return value
    wanted = sorted({m.__name__ for m in members if m is not type(None)})
    raise ValueError(f"{where}: must be {' or '.join(wanted)}, got {value!r}")


def _members(kind: Any) -> set[type]:
    """The plain types a field accepts: unions flattened, enums as their text."""
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return set().union(*(_members(part) for part in typing.get_args(kind)))
    if origin is typing.Literal:
        return {type(choice) for choice in typing.get_args(kind)}
    plain = origin or kind
    if isinstance(plain, type) and issubclass(plain, Enum):
        return {str}
    return {plain}


def _number(text: Any) -> Any:
    """YAML 1.1 leaves numbers such as 1e-4 as text; other text stays."""
    try:
        return float(text)
    except ValueError:
        return text


def training_arguments(
    trainer: Mapping[str, Any], workers: int, unused: bool = False, **changes: Any
) -> Any:
    """Builds TrainingArguments: our defaults, then the section, then `changes`.

    Args:
        trainer: the checked section.
        workers: `data.workers`, unless the section names `dataloader_num_workers` itself.
        unused: whether weights may train that no loss reaches (a tower's last layers).
        changes: what the launch decides (the DeepSpeed file).

    Raises:
        ValueError: transformers refuses a value or a combination.
    """
    from transformers import TrainingArguments

    values: dict[str, Any] = {
        "logging_steps": 10,
        "report_to": "tensorboard",
        "dataloader_num_workers": workers,
        "use_cpu": on_cpu(trainer),
        "prediction_loss_only": True,
        "logging_nan_inf_filter": False,  # which would write the last good loss in its place
        "ddp_find_unused_parameters": unused,
    }
    values |= {**trainer, **changes, "remove_unused_columns": False, "label_names": ["labels"]}
    for old, new in RENAMED.items():
        if new in _types() and old in values:
            values.setdefault(new, values.pop(old))
    recompute = "gradient_checkpointing_kwargs"
    recompute = RENAMED[recompute] if RENAMED[recompute] in _types() else recompute
    values[recompute] = {"use_reentrant": False, **(values.get(recompute) or {})}
    check_device(values)
    best = values.get("metric_for_best_model")
    if best is not None and values.get("greater_is_better") is None:
        values["greater_is_better"] = "loss" not in best  # eval_loss_keep_0.22 does not end with it
    if values.get("use_liger_kernel"):
        values["liger_kernel_config"] = {**UNFUSED, **(values.get("liger_kernel_config") or {})}
    values["output_dir"] = str(Path(values["output_dir"]).expanduser())
    try:
        return TrainingArguments(**values)
    except (ValueError, ImportError) as error:
        raise ValueError(f"trainer: {' '.join(str(error).split())}") from None


def check_device(values: Mapping[str, Any]) -> None:
    """Raises ValueError for what this machine, or a run on its CPU, cannot do."""
    if values["use_cpu"] and values.get("fp16"):
        raise ValueError("trainer.fp16: half precision needs a GPU; use bf16, which a CPU can, too")
    if values.get("use_liger_kernel"):
        if values["use_cpu"]:
            raise ValueError(
                "trainer.use_liger_kernel: its kernels need a GPU, and this run uses the CPU; "
                "remove it"
            )
        if find_spec("liger_kernel") is None:
            raise ValueError(
                "trainer.use_liger_kernel: liger-kernel is not installed; pip install liger-kernel"
            )


def check_reentry(args: Any, ddp: bool, unused: bool) -> None:
    """Refuses what ends in the middle of DDP's first step.

    Args:
        args: TrainingArguments.
        ddp: whether several processes share gradients by DDP, not by DeepSpeed or FSDP.
        unused: whether weights may train that no loss reaches.

    Raises:
        ValueError: reentrant checkpointing beside such weights: DDP looks for them in a graph that
            reentrant layers are not part of yet.
    """
    reentrant = args.gradient_checkpointing and args.gradient_checkpointing_kwargs["use_reentrant"]
    if ddp and unused and reentrant:
        raise ValueError(
            "trainer.gradient_checkpointing_kwargs: reentrant checkpointing does not go with a "
            "trained vision tower on several processes without DeepSpeed or FSDP; set "
            "use_reentrant: false"
        )


def on_cpu(trainer: Mapping[str, Any]) -> bool:
    """Whether the run uses the CPU: as the section says, else where there is no accelerator."""
    import torch

    return bool(trainer.get("use_cpu", not torch.accelerator.is_available()))


def find_file(name: str) -> Path | None:
    """`name` relative to the working directory, else to the project's root."""
    for path in (Path(name).expanduser(), ROOT / name):
        if path.is_file():
            return path
    return None
