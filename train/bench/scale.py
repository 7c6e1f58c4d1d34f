"""Measures of the data path on this machine.

    python -m train.bench.scale loader                # samples/s beside the pruned training step
    python -m train.bench.scale memory                # a million lines of JSONL: memory in use
    python -m train.bench.scale memory --streaming    # the same as a stream
    python -m train.bench.scale index                 # how fast data files are opened

Everything is made in a temporary folder and removed again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from itprune.bench.record import MB, versions
from train.bench.scale_loader import measure_loader
from train.bench.scale_memory import measure_memory, write_lines
from train.data.llava import LlavaRecords
from train.data.messages import JsonlRecords


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.bench.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=tuple(MEASURES))
    parser.add_argument("--workers", type=int, default=2, help="data workers; default 2")
    parser.add_argument("--lines", type=int, default=1_000_000, help="memory, index: lines")
    parser.add_argument("--streaming", action="store_true", help="memory: read as a stream")
    parser.add_argument("--samples", type=int, default=240, help="loader: samples of a round")
    parser.add_argument("--repeats", type=int, default=3, help="loader: rounds; default 3")
    parser.add_argument("--keep", type=float, default=0.22, help="loader: of the step")
    parser.add_argument("--shape", default="cpu", help="loader: of the step's model")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="loader: of the step; default all"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the record there, too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measures and prints; 2 for numbers that cannot be."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in ("workers", "lines", "samples", "repeats", "threads"):
        if vars(args)[name] < 1:
            parser.error(f"--{name}: must be at least 1")
    with tempfile.TemporaryDirectory(prefix="itprune-scale-") as folder:
        try:
            record = MEASURES[args.what](Path(folder), args)
        except ValueError as error:
            parser.error(str(error))
    record = {"bench": args.what, **record, "versions": versions()}
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def loader(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Samples a second of the data path and of the step it feeds."""
    record = measure_loader(
        folder, args.workers, args.samples, args.repeats, args.shape, args.keep, args.threads, say
    )
    data, step = record["loader"], record["step"]
    say(
        f"data path, {args.workers} workers: {data['samples_per_s']:.1f} samples/s, "
        f"{1000 * data['cpu_s_per_sample']:.1f} ms of CPU each"
    )
    say(
        f"pruned {args.shape} step (keep {args.keep}, {step['threads']} threads, batch "
        f"{step['batch']}): {step['step_s']:.2f} s, {step['samples_per_s']:.2f} samples/s"
    )
    say(
        f"the data path feeds {record['feeds']:.1f} times what the step takes "
        f"({record['feeds_by_cpu']:.1f} times by CPU seconds)"
    )
    return record


def memory(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Memory of main process and workers while a long file is read."""
    record = measure_memory(folder, args.lines, args.workers, args.streaming)
    say(f"{args.lines:,} lines, {record['file_mb']:.0f} MB, read in {record['seconds']:.0f} s")
    for name, values in record["processes"].items():
        say(
            f"{name}: RSS {values['rss_start_mb']:.0f} -> {values['rss_peak_mb']:.0f} MB, "
            f"PSS {values['pss_start_mb']:.0f} -> {values['pss_peak_mb']:.0f} MB"
        )
    say(
        f"all together: {record['above_start_mb']:.0f} MB (PSS) above the main process's start, "
        f"{record['above_workers_mb']:.0f} MB above the workers' first batches"
    )
    return record


def index(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Megabytes a second of opening data files."""
    lines = write_lines(folder / "data.jsonl", args.lines)
    listed = folder / "data.json"
    with lines.open() as source, listed.open("w") as target:
        for i, line in enumerate(source):
            target.write(("[" if i == 0 else ",\n") + line.rstrip("\n"))
        target.write("]\n")
    rates = {}
    for path, reader in ((lines, JsonlRecords), (listed, LlavaRecords)):
        begin, cpu = time.perf_counter(), time.process_time()
        assert len(reader(path)) == args.lines
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
        size = path.stat().st_size / MB
        rates[path.suffix] = {"mb": size, "mb_per_s": size / wall, "mb_per_cpu_s": size / cpu}
        say(f"{path.suffix}: {size:.0f} MB at {size / wall:.0f} MB/s ({size / cpu:.0f} per CPU s)")
    return {"lines": args.lines, "files": rates}


def say(text: str) -> None:
    print(text, flush=True)


MEASURES = {"loader": loader, "memory": memory, "index": index}

if __name__ == "__main__":
    sys.exit(main())
