"""Reads what wandb wrote offline: a log of records in blocks, each record a protocol buffer.

wandb 0.31 has no reader in Python any more. Layout: 7 bytes of header, then blocks of 32 KiB; a
record that does not fit into the rest of a block goes on in the next one.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

HEADER, BLOCK = 7, 32768
FULL, LAST = 1, 4


def payloads(data: bytes) -> Iterator[bytes]:
    """The records' bytes."""
    place, whole = HEADER, b""
    while place < len(data):
        rest = BLOCK - place % BLOCK
        if rest < HEADER:  # too short for the head of a piece
            place += rest
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        whole += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (FULL, LAST):
            yield whole
            whole = b""


def history(path: Path) -> list[dict[str, float]]:
    """The logged rows."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for payload in payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows
