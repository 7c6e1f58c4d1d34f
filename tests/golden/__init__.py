"""Golden data: what the published implementations compute, replayed on ours.

A folder holds `vision_N`, `functional_N`, `llm_N` and `yopo_window` safetensors files beside the
tiny models that made them. Each module here adds cases: a function from one file's tensors to what
our code makes of its inputs, compared with the stored output of the same key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionModel

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "golden"


@dataclass
class Golden:
    """One folder of golden data."""

    folder: Path

    @cached_property
    def clip(self) -> CLIPVisionModel:
        """The 24-block tower behind the `vision` files."""
        return CLIPVisionModel.from_pretrained(self.folder / "tiny_clip_24l").eval()

    def files(self, prefix: str) -> list[Path]:
        """The folder's files of one kind."""
        return sorted(self.folder.glob(f"{prefix}*.safetensors"))


class Case(NamedTuple):
    """One key that a kind of file may hold."""

    prefix: str
    key: str
    compute: Callable[[dict[str, Tensor], Golden], Tensor]


CASES: list[Case] = []


def case(prefix: str, key: str) -> Callable[..., Callable[..., Tensor]]:
    """Registers what our code computes for `key` in the files named `prefix`…"""

    def register(compute: Callable[[dict[str, Tensor], Golden], Tensor]) -> Callable[..., Tensor]:
        CASES.append(Case(prefix, key, compute))
        return compute

    return register


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file."""
    return load_file(path)
