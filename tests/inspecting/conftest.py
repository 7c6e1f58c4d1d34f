"""One inspection of the bundled model, and pictures to ask about."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from itprune.cli.inspect import add_parser

MODEL = Path(__file__).parents[2] / "assets" / "tiny-llava"
HTML = 'Is <b>this</b> & "that" <script>alert(1)</script> red?'
LONG = "Tell me please, of all the many digits " + "that you can see in this picture " * 4 + "?"


def inspect(*words: object) -> int:
    """Runs the command in this process."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["inspect", *map(str, words), "--quiet"])
    return args.run(args)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pictures of noise, the second of an unusual size."""
    folder, noise = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = []
    for i, size in enumerate([(96, 96), (150, 110)]):
        pixels = noise.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        paths.append(folder / f"{i}.png")
        Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(paths[-1])
    return paths


@pytest.fixture(scope="session")
def seen(pictures: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an inspection of two pairs."""
    folder = tmp_path_factory.mktemp("seen") / "see"
    pairs = ["--image", pictures[0], "--prompt", HTML, "--image", pictures[1], "--prompt", LONG]
    assert inspect("--model", MODEL, *pairs, "--output", folder, "--max-new-tokens", 3) == 0
    return folder
