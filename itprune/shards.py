"""Weights that only lie in the shards of a training run: put together by DeepSpeed's and
accelerate's own tools.

Both keep Python pickles beside the tensors, and those tools unpickle whatever is there. So every
file is looked through first, and one that names anything but what DeepSpeed, torch and accelerate
write themselves is refused. Names of weights are those of the trained modules.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from enum import EnumType
from glob import escape
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

LATEST = "latest"
"""Names the folder of DeepSpeed's shards."""
FSDP_FOLDER = "pytorch_model_fsdp_0"
FSDP_INDEX = ".metadata"
SINGLE = "model.safetensors"
GETATTR = "builtins.getattr"
SCALERS = "deepspeed.runtime.fp16.loss_scaler"
KNOWN = {
    f"{SCALERS}.LossScaler",
    f"{SCALERS}.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
"""What DeepSpeed pickles beside tensors."""
KNOWN_INDEX = {
    "torch": {
        "Size", "float32", "float16", "bfloat16", "float64", "int64", "int32", "int8", "uint8",
        "bool", "strided", "contiguous_format",
    },
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip
"""What torch pickles as the index of sharded weights."""


def has_shards(folder: Path) -> bool:
    """Whether a folder holds shards of the model's weights."""
    return (folder / LATEST).is_file() or (folder / FSDP_FOLDER / FSDP_INDEX).is_file()


def read_shards(folder: Path) -> dict[str, Tensor]:
    """All weights in a checkpoint's shards, on the CPU, float32 where they trained.

    Args:
        folder: the checkpoint, as the trainer wrote it.

    Raises:
        ValueError: shards are missing or damaged, or hold what nobody writes there.
    """
    tool = "deepspeed" if (folder / LATEST).is_file() else "accelerate"
    if find_spec(tool) is None:
        raise ValueError(f"{folder}: reading these shards needs the package {tool}; pip install it")
    read = _deepspeed if tool == "deepspeed" else _fsdp
    try:
        return read(folder)
    except (OSError, EOFError, RuntimeError, KeyError, AttributeError) as error:
        said = str(error).strip() or type(error).__name__
        raise ValueError(f"{folder}: its shards cannot be read ({said.splitlines()[0]})") from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"{folder}: its shards are not what {tool} writes ({error})") from error


# ------------------------------------------------------------------------------------ DeepSpeed
def _deepspeed(folder: Path) -> dict[str, Tensor]:
    """Trained weights from the optimizer's shards; frozen ones, which ZeRO-1 and 2 leave out of
    those, from the model's own file."""
    inside = folder / (folder / LATEST).read_text(encoding="utf-8").strip()
    if escape(str(inside)) != str(inside):  # DeepSpeed would read what the pattern matches
        raise pickle.UnpicklingError(f"the name {str(inside)!r} is a pattern; rename the folder")
    files = sorted(inside.glob("*_states.pt"))
    for file in files:
        _look_through(file)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(io.StringIO()):  # it prints its progress
        state: dict[str, Tensor] = dict(get_fp32_state_dict_from_zero_checkpoint(str(folder)))
    for file in files:
        if not file.name.startswith("mp_rank_00"):  # under ZeRO-3 each rank has but a part
            continue
        whole: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        for name, value in (whole["module"] or {}).items():
            state.setdefault(name, value)
    return state


def _look_through(file: Path) -> None:
    """Raises UnpicklingError for a file that names what DeepSpeed does not write."""
    named = set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    strange = named - KNOWN - {GETATTR}
    if strange:
        raise pickle.UnpicklingError(f"{file.name} names {sorted(strange)[0]}")
    if GETATTR in named:
        torch.load(file, map_location="cpu", mmap=True, weights_only=False, pickle_module=_Members)


def _member(kind: Any, name: str) -> Any:
    """`getattr` for members of an enumeration alone, which is how Python 3.11.0 to 3.11.3 pickle
    them."""
    if not isinstance(kind, EnumType) or name not in kind.__members__:
        raise pickle.UnpicklingError(f"{GETATTR} is used for more than an enumeration")
    return kind[name]


class _Members:
    """Stands for the module `pickle`: what loads with it takes attributes of nothing else."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            found = super().find_class(module, name)  # older names of modules are told apart here
            return _member if found is getattr else found


# ----------------------------------------------------------------------------------------- FSDP
class _Index(pickle.Unpickler):
    """Reads an index of sharded weights, and nothing that only looks like one."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" == GETATTR:
            return _member
        if name not in KNOWN_INDEX.get(module, ()):
            raise pickle.UnpicklingError(f"{FSDP_INDEX} names {module}.{name}")
        return super().find_class(module, name)


def _fsdp(folder: Path) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    inside = folder / FSDP_FOLDER
    with (inside / FSDP_INDEX).open("rb") as file:
        index = _Index(file).load()
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise pickle.UnpicklingError(f"{name} is no tensor")
    from accelerate.utils import merge_fsdp_weights

    with _room_beside(folder) as room:
        merge_fsdp_weights(str(inside), str(room))
        return load_file(room / SINGLE)


@contextmanager
def _room_beside(folder: Path) -> Iterator[Path]:
    """A folder for one whole copy of the weights: on the disk that holds the shards, which is made
    for such sizes, as /tmp is not."""
    with TemporaryDirectory(prefix=".merging-", dir=folder.parent) as room:
        yield Path(room)
