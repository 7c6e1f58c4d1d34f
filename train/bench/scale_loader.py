"""The loader measure: does the data path keep up with the pruned training step?

The data path is the real one: JPEG pictures of 640x480 and conversations of four turns in a JSONL
file, read, decoded, resized to 336 pixels by CLIP's image processor, tokenized and collated by
workers. The step is the bench's of the same picture size.
Both take turns, so that a drift of the machine falls on both.
"""

from __future__ import annotations

import json
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Subset
from transformers import CLIPImageProcessor, LlavaProcessor

from itprune.bench.shapes import build_model, find_shape, make_batch, set_train_mode
from itprune.bench.timing import median, use_threads
from itprune.bench.variants import train_variants
from train.data.collate import Collator
from train.data.dataset import SampleDataset, build_dataset
from train.data.encode import Encoder
from train.model import load_processor
from train.recipe.arguments import ROOT
from train.recipe.sections import DataSection

BASE = "assets/tiny-llava"
VARIANT = "two_stage_packed"
"""Of the bench's pruned steps the fastest one."""
SIZE = (640, 480)
PICTURES = 32
WORDS = ("what", "colour", "has", "the", "large", "round", "thing", "on", "its", "left", "side")


def measure_loader(
    folder: Path,
    workers: int,
    samples: int,
    repeats: int,
    shape: str,
    keep: float,
    threads: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Measures both in turns.

    Args:
        folder: for pictures and data file.
        workers: of the data path.
        samples: read in a round.
        repeats: rounds.
        shape: of the step's model.
        keep: target of the step.
        threads: of the step.
        progress: told what happens.

    Returns:
        A JSON-able record; `feeds` is samples/s of the data path over samples/s of the step, by the
        wall clock; `feeds_by_cpu` the same by CPU seconds, as if every worker and thread had a core
        to itself: what others do on the machine hardly moves it.

    Raises:
        ValueError: unknown shape, or a machine too small for it.
    """
    size = find_shape(shape)
    data = open_data(write_pictures(folder, samples))
    step = Step(size, keep)
    walls, cpus, steps, busy = [], [], [], []
    for i in range(repeats):
        wall, cpu = read_once(data, workers, size.batch, samples)
        walls.append(wall)
        cpus.append(cpu)
        with use_threads(threads):
            wall, cpu = step()
        steps.append(wall)
        busy.append(cpu)
        progress(f"round {i + 1}: {1 / walls[-1]:.1f} samples/s, step {steps[-1]:.2f} s")
    loaded, taken = 1 / median(walls), size.batch / median(steps)
    free = (workers / median(cpus)) / (size.batch * threads / median(busy))
    return {
        "shape": shape,
        "keep": keep,
        "loader": {
            "workers": workers,
            "samples_per_s": loaded,
            "cpu_s_per_sample": median(cpus),
        },
        "step": {
            "variant": VARIANT,
            "batch": size.batch,
            "threads": threads,
            "step_s": median(steps),
            "cpu_s": median(busy),
            "samples_per_s": taken,
        },
        "feeds": loaded / taken,
        "feeds_by_cpu": free,
    }


class Step:
    """One pruned training step: forward, backward, optimizer."""

    def __init__(self, shape: Any, keep: float) -> None:
        self.model = build_model(shape, training=True)
        self.batch = make_batch(shape, shape.batch, labels=True)
        self.variant = next(v for v in train_variants(shape, keep) if v.name == VARIANT)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
        self.variant.calibrate(self.model, self.batch)
        set_train_mode(self.model)
        self()  # warms up

    def __call__(self) -> tuple[float, float]:
        """Wall-clock and CPU seconds."""
        with self.variant.on(self.model):
            begin, cpu = time.perf_counter(), time.process_time()
            self.model(**self.batch).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return time.perf_counter() - begin, time.process_time() - cpu


def read_once(data: SampleDataset, workers: int, batch: int, samples: int) -> tuple[float, float]:
    """Wall-clock seconds a sample once all workers are at work, and CPU seconds a sample.

    CPU seconds count from the workers' start, which is cheap, as they are forked.
    """
    order = torch.arange(samples) % len(data)
    loader = DataLoader(
        Subset(data, order.tolist()),
        batch_size=batch,
        collate_fn=Collator(0),
        num_workers=workers,
    )
    before = children_seconds()
    begin, first, read = 0.0, 0, 0
    for number, found in enumerate(loader, 1):
        read += len(found["input_ids"])
        if number == workers:  # each of them has delivered one
            begin, first = time.perf_counter(), read
    end = time.perf_counter()
    del loader
    if read <= first:
        raise ValueError(f"--samples: {samples} are too few for {workers} workers; take more")
    return (end - begin) / (read - first), (children_seconds() - before) / read


def children_seconds() -> float:
    """CPU seconds of the workers that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write_pictures(folder: Path, samples: int) -> Path:
    """A JSONL file of conversations about a few pictures, which are as hard to decode as photos."""
    rng = random.Random(0)
    for i in range(PICTURES):
        noise = Image.frombytes("RGB", SIZE, rng.randbytes(SIZE[0] * SIZE[1] * 3))
        noise.filter(ImageFilter.GaussianBlur(1.5)).save(folder / f"{i}.jpg", quality=95)
    path = folder / "data.jsonl"
    with path.open("w") as file:
        for i in range(samples):
            turns = []
            for turn in range(2):
                asked, said = (" ".join(rng.choices(WORDS, k=count)) for count in (12, 50))
                image = "<image>\n" if turn == 0 else ""
                turns += [{"role": "user", "content": image + asked}]
                turns += [{"role": "assistant", "content": said}]
            record = {"images": [f"{i % PICTURES}.jpg"], "messages": turns}
            file.write(json.dumps(record) + "\n")
    return path


def open_data(path: Path) -> SampleDataset:
    """The data set, through CLIP's image processor at 336 pixels."""
    base = load_processor(str(ROOT / BASE))
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
        ),
        tokenizer=base.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=base.chat_template,
    )
    section = DataSection(train=(str(path),))
    return build_dataset(section, section.train, Encoder(processor, 2048))
