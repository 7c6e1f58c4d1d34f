"""A checkpoint counts only when it is complete: a list of its files is written last.

The list names every file with its size, so a folder that a crash, a full disk or a careless copy
cut short is told from a whole one, whatever wrote its files: transformers, PEFT or DeepSpeed.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

COMPLETE = "complete.json"
NAME = re.compile(r"checkpoint-(\d+)")
ZIP = b"PK\x03\x04"
LONGEST_HEADER = 100_000_000
"""Bytes; safetensors refuses more."""


def seal(folder: Path) -> None:
    """Lists the files of a checkpoint that all processes have written."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / COMPLETE)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    partial = folder / f".{COMPLETE}"
    partial.write_text(json.dumps({"files": sizes}, indent=1), encoding="utf-8")
    partial.replace(folder / COMPLETE)


def flaw(folder: Path) -> str | None:
    """Why a checkpoint does not count, or None for a complete one.

    Sizes, the tables of contents of weights and the text of JSON files are read, not the weights.
    """
    try:
        listed = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"the run ended while it was written: there is no {COMPLETE}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{COMPLETE} cannot be read: {error}"
    for name, size in listed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found:,} of {size:,} bytes"
        try:
            _look_into(path, size)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            return f"{name} is damaged: {error}"
    return None


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints in a folder, complete or not, the newest first."""
    found = [path for path in output.glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def last_complete(output: Path) -> Path | None:
    """The complete checkpoint with the highest step."""
    return next((path for path in checkpoints(output) if flaw(path) is None), None)


def clear(folder: Path) -> None:
    """Removes a checkpoint; its list goes first, so that half a removal does not count either."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove_old(output: Path, limit: int | None, best: str | None) -> None:
    """Removes all but the newest complete checkpoints, and whatever is incomplete.

    Args:
        output: their folder.
        limit: how many to leave, at least one; None: all.
        best: the folder of one to leave in any case.
    """
    if not limit or limit < 0:
        return
    found = checkpoints(output)
    whole = [folder for folder in found if flaw(folder) is None]  # a listed file may be cut short
    left = whole[:1] + [folder for folder in whole[1:] if best and folder.samefile(best)]
    left += [folder for folder in whole if folder not in left][: max(limit - len(left), 0)]
    for folder in found:
        if whole and folder not in left:
            clear(folder)


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _look_into(path: Path, size: int) -> None:
    """Raises where a file of weights or of JSON cannot be what its name says."""
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".safetensors":
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, LONGEST_HEADER):
                raise ValueError("no table of contents")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for n, entry in header.items() if n != "__metadata__"]
        if 8 + length + max(ends, default=0) != size:
            raise ValueError("its weights do not fill it")
    elif path.suffix in (".pt", ".pth", ".bin"):
        with path.open("rb") as file:
            packed = file.read(4) == ZIP
        if packed:
            zipfile.ZipFile(path).close()
