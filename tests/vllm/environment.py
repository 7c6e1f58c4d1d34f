"""Makes the environment vLLM's CPU build runs in: packages of its own, none of the running one.

ITPRUNE_VLLM_ENV names one that is there already (`make test-vllm`); without it a new one is made,
which takes 3.5 GB and some minutes, and is taken away again.
"""

from __future__ import annotations

import os
import shutil
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lmms.inside import ROOT, Inside, copy_source, install

PACKAGES = ROOT / "constraints-vllm.txt"
NAMED = "ITPRUNE_VLLM_ENV"
VERSION = "0.32.0"
VARIABLES = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "PYTHONPATH": str(ROOT),
}
"""Beside those of `Inside`."""


@contextmanager
def environment(work: Path) -> Iterator[Inside]:
    """The environment with this package in it; the test is skipped where vLLM cannot be had."""
    named = os.environ.get(NAMED)
    folder = Path(named).absolute() if named else work / "environment"
    inside = Inside(folder, work)
    try:
        if not (folder / "bin" / "vllm").exists() and (told := make(inside)):
            pytest.skip(f"vLLM's CPU build cannot be had: {told}")
        status, told = install(inside, ["--no-build-isolation", str(copy_source(work))])
        assert status == 0, told
        yield inside
    finally:
        if not named:
            shutil.rmtree(folder, ignore_errors=True)


def make(inside: Inside) -> str:
    """Installs vLLM and its packages.

    Returns:
        What stands against it; nothing, when all is there.
    """
    venv.create(inside.folder, with_pip=False)
    status, told = install(inside, ["-r", str(PACKAGES)])
    if status:
        return told
    library = next((inside.folder / "lib").glob("python*/site-packages"))
    # `vllm serve` asks for the version of a package of vLLM's own name.
    named = library / f"vllm-{VERSION}+cpu.dist-info"
    named.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n"
    (named / "METADATA").write_text(metadata)
    if inside.run(inside.python, "-c", "import torchvision").returncode:
        shutil.copy(Path(__file__).with_name("torchvision_cpu.py"), library)
        (library / "torchvision_cpu.pth").write_text("import torchvision_cpu\n")
    return ""


if __name__ == "__main__":  # python -m tests.vllm.environment FOLDER
    sys.exit(make(Inside(Path(sys.argv[1]).absolute(), Path.cwd())) or None)
