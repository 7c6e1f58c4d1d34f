"""Fingerprints: whether what lies in a folder belongs to the model, data and settings at hand."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

MIB = 2**20
SUFFIXES = (".json", ".safetensors", ".model", ".jinja")


def model_digest(folder: Path) -> str:
    """Small files whole; of large ones the size and both ends, where a tuning leaves its mark.

    Args:
        folder: of a checkpoint or a model.
    """
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in SUFFIXES:
            with path.open("rb") as file:
                size = path.stat().st_size
                ends = file.read(MIB)
                file.seek(max(size - MIB, 0))
                ends += file.read()
            found[path.name] = [size, hashlib.sha256(ends).hexdigest()]
    return digest(found)


def digest(value: Any) -> str:
    """64 hexadecimal digits of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
