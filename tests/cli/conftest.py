"""A pruned checkpoint of the tiny random LLaVA, and pictures to ask about."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from itprune import PromptFormat, PruneConfig, attach, load_pretrained, save_pretrained


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 0.png … 5.png."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for index in range(6):
        pixels = noise.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((70, 60)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def base(tiny_llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights wide enough that pictures and words change its answers."""
    folder = tmp_path_factory.mktemp("base")
    loaded = load_pretrained(tiny_llava_folder, device="cpu")
    draw = torch.Generator().manual_seed(1)
    for name, weight in loaded.model.named_parameters():
        if weight.ndim >= 2:
            width = 0.7 if "embed" in name else 0.6 / weight.shape[-1] ** 0.5
            weight.data.copy_(torch.randn(weight.shape, generator=draw) * width)
    save_pretrained(folder, loaded.model, loaded.processor, None)
    return folder


@pytest.fixture(scope="session")
def checkpoint(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a two-stage pruner in its raw rule (keep: null), so no calibration is due."""
    folder = tmp_path_factory.mktemp("checkpoint")
    loaded = load_pretrained(base, device="cpu")
    prompt = PromptFormat.from_processor(loaded.processor)
    attached = attach(loaded.model, PruneConfig(keep=None), prompt=prompt)
    save_pretrained(folder, loaded.model, loaded.processor, attached)
    return folder


@pytest.fixture
def write_lines(tmp_path: Path, pictures: Path) -> Callable[..., Path]:
    """Writes records (or raw lines) as in.jsonl beside links to the pictures."""

    def write(*records: object) -> Path:
        for picture in pictures.iterdir():
            (tmp_path / picture.name).symlink_to(picture)
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        path = tmp_path / "in.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def questions(write_lines: Callable[..., Path]) -> Path:
    """Seven lines: every layout, several images, no image, and two that are bad."""
    return write_lines(
        {"id": "a", "image": "0.png", "prompt": "What colour is the square?"},
        {"images": ["1.png", "2.png"], "prompt": "Is <image> left of <image> ?"},
        "{not json",
        {"id": "text", "prompt": "green blue yellow"},
        {"id": "gone", "image": "nowhere.png", "prompt": "What is it?"},
        {
            "image": "3.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhich shape is on the left?"},
                {"from": "gpt", "value": "The circle."},
            ],
        },
        {
            "id": "chat",
            "messages": [
                {"role": "user", "content": [{"type": "image", "path": "4.png"}]},
                {"role": "assistant", "content": "The square is red."},
                {"role": "user", "content": "Which shape is on the left?"},
            ],
        },
    )
