"""Host: the shape of the model a method works in. Families fill it in, methods read it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Host:
    """The shape of the model a method works in."""

    depth: int
    """LLM layers."""
    width: int
    """LLM width."""
    heads: int
    """LLM attention heads."""
    vision_blocks: int
    vision_width: int
    vision_heads: int
    feature_block: int
    """0-based encoder block whose output becomes the features."""
    has_cls: bool
    grid: tuple[int, int]
    """Rows and columns of patches of an image of the usual size."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "grid": list(self.grid)}

    @classmethod
    def example(cls) -> Host:
        """LLaVA-1.5-7B, for listings and for reading options without a model."""
        return cls(32, 4096, 32, 24, 1024, 16, 22, True, (24, 24))
