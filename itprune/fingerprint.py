"""Fingerprints: whether what lies in a folder belongs to the model, data and settings at hand."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import IO, Any

MIB = 2**20
SAMPLE = 4096
"""Bytes looked at in each place of a tensor."""
SUFFIXES = (".json", ".safetensors", ".model", ".jinja")


def model_digest(folder: Path) -> str:
    """Of a checkpoint or a model. Small files count whole; of a large one the size, both ends, and
    in weights the beginning and the middle of every tensor: tuning one part of a model changes
    bytes in the middle of a file.

    Args:
        folder: of a checkpoint or a model.
    """
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in SUFFIXES:
            with path.open("rb") as file:
                found[path.name] = [path.stat().st_size, _sampled(file, path.stat().st_size)]
    return digest(found)


def digest(value: Any) -> str:
    """64 hexadecimal digits of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sampled(file: IO[bytes], size: int) -> str:
    found = hashlib.sha256(file.read(MIB))
    if size > MIB:
        for place in _tensors(file, size):
            file.seek(max(place, MIB))
            found.update(file.read(SAMPLE))
        file.seek(size - MIB)
        found.update(file.read())
    return found.hexdigest()


def _tensors(file: IO[bytes], size: int) -> list[int]:
    """Where a safetensors file's tensors begin, and where their middles are; no place in others."""
    file.seek(0)
    start = 8 + int.from_bytes(file.read(8), "little")
    if start > size:
        return []
    try:
        header = json.loads(file.read(start - 8))
        ranges = [entry["data_offsets"] for key, entry in header.items() if key != "__metadata__"]
        return [start + place for begin, end in ranges for place in (begin, (begin + end) // 2)]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []  # no weights; whoever loads it will say so
