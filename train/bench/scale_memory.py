"""The memory measure: a long JSONL file read from end to end, in a shuffled order or as a stream.

Reading, parsing, collating and the way from workers to the main process are the real ones; in place
of tokenizer and image processor, whose time would hide it all, stands an encoder of plain bytes.
RSS counts pages that processes share in each of them, PSS divides them among them: its sum is what
the run takes up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from itprune.bench.record import MB
from train.data.collate import Collator
from train.data.dataset import build_dataset
from train.data.images import ImageOpener
from train.data.mixture import EpochSampler, Mixture
from train.data.sample import Sample
from train.data.stream import build_stream, fixed
from train.recipe.sections import DataSection

BATCH = 256
EVERY = 50
"""Batches between two looks at the memory."""
TEXT = "The quick brown fox jumps over the lazy dog, and nobody can say which colour it has. "


class ByteEncoder:
    """Stands in for the real one: the last bytes of the last turn are its tokens."""

    def __call__(self, sample: Sample, open_image: ImageOpener) -> dict[str, Any]:
        data = bytearray(sample.turns[-1].parts[-1].encode()[-64:])
        ids = torch.frombuffer(data, dtype=torch.uint8).long()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class Watch:
    """Start and peak of every process."""

    def __init__(self) -> None:
        self.processes: dict[str, dict[str, float]] = {}
        self.total = 0.0

    def look(self, names: dict[int, str]) -> float:
        """Takes note; returns the sum of PSS in MB."""
        now = 0.0
        for pid, name in names.items():
            rss, pss = resident(pid)
            now += pss
            seen = self.processes.setdefault(name, {"rss_start_mb": rss, "pss_start_mb": pss})
            seen["rss_peak_mb"] = max(rss, seen.get("rss_peak_mb", 0.0))
            seen["pss_peak_mb"] = max(pss, seen.get("pss_peak_mb", 0.0))
        self.total = max(self.total, now)
        return now


def measure_memory(folder: Path, lines: int, workers: int, streaming: bool) -> dict[str, Any]:
    """Writes the file and reads all of it.

    Args:
        folder: where it is written.
        lines: of the file.
        workers: of the loader.
        streaming: front to end instead of in a shuffled order.

    Returns:
        A JSON-able record, memory in MB.

    Raises:
        ValueError: this system does not tell a process's memory.
    """
    if not Path("/proc/self/smaps_rollup").is_file():
        raise ValueError("memory: needs /proc/PID/smaps_rollup, which only Linux has")
    path = write_lines(folder / "data.jsonl", lines)
    section = DataSection(train=(str(path),), workers=workers, streaming=streaming)
    watch, main = Watch(), int(Path("/proc/self").resolve().name)
    start = watch.look({main: "main"})
    begin, read, first = time.perf_counter(), 0, 0.0
    batches = stream(section, lines) if streaming else shuffled(section)
    for number, batch in enumerate(batches):
        read += len(batch["input_ids"])
        if number == 4 * workers:
            first = watch.look(family(main))
        elif number % EVERY == 0:
            watch.look(family(main))
    watch.look({main: "main"})
    return {
        "lines": lines,
        "read": read,
        "workers": workers,
        "streaming": streaming,
        "file_mb": path.stat().st_size / MB,
        "seconds": time.perf_counter() - begin,
        "processes": watch.processes,
        "above_start_mb": watch.total - start,
        "above_workers_mb": watch.total - first,
    }


def shuffled(section: DataSection) -> Iterator[dict[str, Any]]:
    """One epoch in a shuffled order."""
    data = build_dataset(section, section.train, ByteEncoder())  # type: ignore[arg-type]
    everything = Mixture([len(data)], [1.0], section.train)
    return iter(
        DataLoader(
            data,
            batch_size=BATCH,
            sampler=EpochSampler(everything, seed=0),
            collate_fn=Collator(0),
            num_workers=section.workers,
        )
    )


def stream(section: DataSection, lines: int) -> Iterator[dict[str, Any]]:
    """As many samples as the file has."""
    feed = build_stream(section, ByteEncoder(), Collator(0), fixed(BATCH))  # type: ignore[arg-type]
    return islice(feed.batches(0), -(-lines // BATCH))


def family(main: int) -> dict[int, str]:
    """A process and its children, by name."""
    children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
    return {main: "main"} | {int(pid): f"worker {i}" for i, pid in enumerate(children, 1)}


def resident(pid: int) -> tuple[float, float]:
    """RSS and PSS in MB; zeros for a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    values = dict(line.split(":", 1) for line in lines[1:])
    return tuple(int(values[name].split()[0]) * 1024 / MB for name in ("Rss", "Pss"))  # type: ignore[return-value]


def write_lines(path: Path, lines: int) -> Path:
    """Conversations of some hundred bytes, LLaVA's layout."""
    with path.open("w") as file:
        for i in range(lines):
            turns = [
                {"from": "human", "value": f"Question {i}: " + TEXT},
                {"from": "gpt", "value": TEXT * (1 + i % 7)},
            ]
            file.write(json.dumps({"id": str(i), "conversations": turns}) + "\n")
    return path
