"""`itprune serve` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = """\
import argparse, sys
from itprune.cli import serve
parser = argparse.ArgumentParser()
serve.add_parser(parser.add_subparsers())
args = parser.parse_args()
sys.exit(args.run(args))
"""
"""The subcommand alone, whatever else the command line has."""


@contextmanager
def running(
    options: Sequence[str], more: Mapping[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server on a free port: its address and process.

    Args:
        options: behind `itprune serve`.
        more: environment variables.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "serve", *options, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(more or {})},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http://127.0.0.1:" in line, process.communicate()[1]
        yield line.split()[2].removesuffix("/v1"), process
    finally:
        process.kill()
        process.communicate()
