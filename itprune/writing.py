"""Files written in one step: after a crash, too, a reader finds the old one or the new one."""

from __future__ import annotations

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one step; if that fails, the old one stays and nothing lies beside it.

    Args:
        path: the file; its folder is there.
        text: what it holds; half a surrogate pair, which UTF-8 does not know, is spelt out.

    Raises:
        OSError: it cannot be written.
    """
    # Of its own process: several may write the same file at once.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
