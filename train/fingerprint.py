"""Fingerprints of data files: whether two runs read the same.

A file up to 64 MB is hashed whole. Of a larger one, and of the files of an entry that come to more
than 1 GB together (shards), its two ends and 64 blocks spread evenly between them are, which a
changed, cut or reordered file does not pass, but a few changed bytes may; every fingerprint says
which of the two it is. Images beside a data file are not looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from train.data.formats import files_of

WHOLE = 64 * 1024 * 1024
"""Bytes up to which a file is hashed whole."""
TOGETHER = 1024 * 1024 * 1024
"""Bytes up to which this holds for all files of an entry."""
END = 128 * 1024
"""Bytes of each end of a larger one."""
BLOCKS = 64
BLOCK = 4096
SAMPLE = 2 * END + BLOCKS * BLOCK
SAMPLED = f"both ends ({END} bytes each) and {BLOCKS} blocks of {BLOCK} bytes, spread evenly"


def fingerprints(
    names: Sequence[str], whole: int = WHOLE, together: int = TOGETHER
) -> list[dict[str, Any]]:
    """Of all files that entries of `data.train` or `data.val` name.

    Args:
        names: the entries: files, patterns, folders, names on the hub.
        whole: bytes up to which a file is hashed whole.
        together: bytes of an entry up to which its files are.

    Returns:
        {"name", "bytes", "sha256", "of"} for each file; `of` says what was hashed, or why nothing
        was.
    """
    return [one for name in names for one in _of_entry(list(_files(name)), whole, together)]


def _of_entry(paths: Sequence[Path], whole: int, together: int) -> Iterator[dict[str, Any]]:
    """Of the files of one entry, so that what stands beside it in a mixture changes nothing."""
    few = sum(path.stat().st_size for path in paths if path.exists()) <= together
    for path in paths:
        yield _of_file(path, whole if few else min(whole, SAMPLE))


def _files(name: str) -> Iterator[Path]:
    """The files of an entry; a saved dataset is all of its folder's."""
    for path in files_of(name):
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.is_file())
        else:
            yield path


def _of_file(path: Path, whole: int) -> dict[str, Any]:
    if not path.exists():  # what was read anyway is a name on the hub
        return {"name": str(path), "bytes": None, "sha256": None, "of": "no local file"}
    try:
        size = path.stat().st_size
        digest, of = (_whole(path), "the whole file") if size <= whole else _parts(path, size)
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        return {"name": str(path), "bytes": None, "sha256": None, "of": reason}
    return {"name": str(path), "bytes": size, "sha256": digest, "of": of}


def _whole(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parts(path: Path, size: int) -> tuple[str, str]:
    digest = hashlib.sha256()
    gap = max(size - 2 * END, 0) / (BLOCKS + 1)
    blocks = [(END + round(gap * (i + 1)), BLOCK) for i in range(BLOCKS)]
    with path.open("rb") as file:
        for start, length in [(0, END), *blocks, (max(size - END, 0), END)]:
            file.seek(start)
            digest.update(file.read(length))
    return digest.hexdigest(), SAMPLED
