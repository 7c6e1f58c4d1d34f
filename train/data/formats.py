"""Which files an entry of `data.train` names, and what kind of data a file is."""

from __future__ import annotations

import glob
import re
from pathlib import Path

KINDS = {
    ".json": "llava",
    ".jsonl": "messages",
    ".jsonl.gz": "gzip",
    ".tar": "tar",
    ".parquet": "dataset",
    ".arrow": "dataset",
}
STREAMED = ("gzip", "tar")
"""Kinds that are read from front to end only."""
KNOWN = "LLaVA .json, messages .jsonl, .parquet, .arrow, a saved dataset's folder or a hub name"
SHARDS = "shards-000.tar"
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def files_of(name: str) -> list[Path]:
    """The files of an entry: `{000..099}` and `{a,b}` are written out, `*`, `?` and `[...]` are
    matched, a folder of tar shards is its shards; anything else is the entry itself.

    Raises:
        ValueError: a pattern that matches nothing, or names files that are not there.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return sorted(path.glob("*.tar")) or [path]
    if path.exists():
        return [path]
    names = write_out(str(path))
    if len(names) > 1:
        missing = [one for one in names if not Path(one).is_file()]
        if missing:
            raise ValueError(
                f"{name}: {len(missing)} of its {len(names)} files are missing, such as "
                f"{missing[0]}"
            )
        return [Path(one) for one in names]
    if glob.has_magic(str(path)):
        found = sorted(glob.glob(str(path)))
        if not found:
            raise ValueError(f"{name}: the pattern matches no file")
        return [Path(one) for one in found]
    return [path]


def write_out(pattern: str) -> list[str]:
    """Every text that braces stand for: `a{08..10}` is a08, a09 and a10, `{x,y}` is x and y."""
    found = BRACES.search(pattern)
    if found is None:
        return [pattern]
    inside = RANGE.fullmatch(found[1])
    if inside is not None:
        first, last = int(inside[1]), int(inside[2])
        choices = [str(number).zfill(len(inside[1])) for number in range(first, last + 1)]
    else:
        choices = found[1].split(",")
    rest = write_out(pattern[found.end() :])
    return [pattern[: found.start()] + choice + tail for choice in choices for tail in rest]


def kind_of(path: Path, wanted: str = "auto") -> str:
    """llava, messages, dataset, gzip or tar: as `data.format` says, else by ending.

    Raises:
        ValueError: the file is missing or of no known kind.
    """
    guessed = next((kind for end, kind in KINDS.items() if path.name.endswith(end)), None)
    if wanted == "dataset" or (guessed is None and wanted == "auto" and _is_dataset(path)):
        return "dataset"
    if not path.is_file():
        raise ValueError(f"{path}: no such data file ({KNOWN})")
    if guessed in STREAMED:
        return guessed
    if wanted == "llava" and path.suffix != ".jsonl":
        return "llava"
    if wanted in ("llava", "messages"):
        return "messages"
    if guessed is None:
        raise ValueError(f"{path}: of no known format ({KNOWN}); name it in data.format")
    return guessed


def _is_dataset(path: Path) -> bool:
    """A folder, or something that looks like a name on the hub."""
    if path.is_dir():
        return True
    return len(path.parts) == 2 and not path.suffix and not path.is_absolute()
