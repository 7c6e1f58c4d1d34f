"""A folder that commands write: all of it, or nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write to; it takes its name when all is done.

    Raises:
        ValueError: `output` holds something already, or cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: exists already; name a new folder")
    partial = output.with_name(f"{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{output}: cannot be written ({error.strerror})") from None
    try:
        yield partial
        os.replace(partial, output)
    except (OSError, SafetensorError) as error:  # a full disk, as safetensors tells it
        said = str(error).splitlines()[0] if not isinstance(error, OSError) else error.strerror
        raise ValueError(f"{output}: cannot be written ({said})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
