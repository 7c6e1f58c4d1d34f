"""Limits: how much one visitor, and all of them together, may ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of the server.

    Raises:
        ValueError: one that lets nothing through.
    """

    body_mb: float = 10.0
    """Largest upload, in 10^6 bytes."""
    pixels: int = 16_000_000
    """Largest picture; decoded it takes three bytes a pixel, and more in the processor."""
    prompt: int = 2000
    """Longest question, in characters."""
    answer: int = 512
    """Longest answer, in tokens."""
    seconds: float = 120.0
    """Longest time one answer may take on the model; it is then cut."""
    upload_seconds: float = 30.0
    """Longest time an upload may take."""
    waiting: int = 32
    """Questions that may wait for the model."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}: must be above 0, got {value}")

    @property
    def body_bytes(self) -> int:
        """`body_mb` in bytes."""
        return int(self.body_mb * 1_000_000)
