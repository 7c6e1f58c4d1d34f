"""Secrets: keys of servers, from a file or an environment variable.

A key on the command line could be read by everybody on the machine, hence variables; no other file
of the package reads any. A message never holds what was found.
"""

from __future__ import annotations

import os
from pathlib import Path


def of_variable(name: str) -> str | None:
    """A key in a variable; None: it is not set.

    Args:
        name: of the variable.

    Raises:
        ValueError: it is empty, or no header of HTTP can hold what it says.
    """
    value = os.environ.get(name)
    if value is None:
        return None
    if not value.strip():
        raise ValueError(f"{name}: is empty; set it to a key, or unset it")
    return _checked(name, value.strip())


def of_file(option: str, path: Path) -> tuple[str, ...]:
    """Keys of a file, one a line; empty lines and those that begin with # are none.

    Args:
        option: that named it.
        path: of the file.

    Raises:
        ValueError: it cannot be read, holds no key, or one that no header of HTTP can hold.
    """
    where = f"{option} {path}"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError):
        raise ValueError(f"{where}: cannot be read") from None
    stripped = [line.strip() for line in lines]
    keys = tuple(_checked(where, line) for line in stripped if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"{where}: holds no key")
    return keys


def _checked(where: str, key: str) -> str:
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{where}: a key must have plain letters only, and no spaces")
    return key
