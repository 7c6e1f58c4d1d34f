"""What tells one model from another, without reading all of its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from itprune.fingerprint import MIB, digest, model_digest


def weights(folder: Path, **changed: torch.Tensor) -> str:
    """The digest of a model of 6 MB."""
    tensors = {f"layer{i}": torch.zeros(512, 512) for i in range(6)} | changed
    save_file(tensors, folder / "model.safetensors")
    return model_digest(folder)


def test_a_tensor_in_the_middle_of_a_large_file_counts(tmp_path: Path) -> None:
    before = weights(tmp_path)
    assert weights(tmp_path) == before
    assert weights(tmp_path, layer3=torch.full((512, 512), 1e-3)) != before
    assert weights(tmp_path, layer0=torch.ones(512, 512)) != before
    assert weights(tmp_path, layer5=torch.ones(512, 512)) != before


def test_small_files_count_whole_and_others_not_at_all(tmp_path: Path) -> None:
    before = weights(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert model_digest(tmp_path) == before
    (tmp_path / "config.json").write_text("{}")
    one = model_digest(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert len({before, one, model_digest(tmp_path)}) == 3


@pytest.mark.parametrize(
    "start",
    [
        b"\xff" * 8,
        b"\x02" + b"\0" * 7 + b"[]",
        b"\x03" + b"\0" * 7 + b"{x}",
        b"\x20" + b"\0" * 7 + b'{"a":{"data_offsets":[-90,1,3]}}',
        b"\x20" + b"\0" * 7 + b'{"a":{"data_offsets":["x",300]}}',
    ],
)
def test_a_large_file_of_something_else_counts_by_its_ends(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "model.safetensors"
    content = bytearray(start + b"\1" * 3 * MIB)
    path.write_bytes(content)
    before = model_digest(tmp_path)
    content[-1] = 0
    path.write_bytes(content)
    assert model_digest(tmp_path) != before


def test_the_order_of_keys_does_not_count() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})
