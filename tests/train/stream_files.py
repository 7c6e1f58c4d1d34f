"""Files to stream: JSONL and tar shards of a few samples."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from tests.train.helpers import turn

MESSAGES = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}


def line(i: int) -> str:
    return json.dumps({"id": i, **MESSAGES}) + "\n"


def write_lines(path: Path, count: int, first: int = 0) -> Path:
    path.write_text("".join(line(first + i) for i in range(count)))
    return path


def jpeg(colour: str = "red") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(data, "JPEG")
    return data.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def record(image: object = None) -> bytes:
    asked = "<image>\nWhat?" if image is not None else "What?"
    turns = [turn("human", asked), turn("gpt", "A dog.")]
    return json.dumps({"image": image, "conversations": turns}).encode()


def shard(path: Path, keys: range) -> Path:
    """Samples with an image, every third one of text alone."""
    members: dict[str, bytes] = {}
    for i in keys:
        if i % 3:
            members[f"{i:03}.jpg"] = jpeg()
        members[f"{i:03}.json"] = record(f"coco/{i:03}.jpg" if i % 3 else None)
    return write_tar(path, members)
