"""Limits: how much one client, and all of them together, may ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of the server.

    Raises:
        ValueError: one that lets nothing through.
    """

    body_mb: float = 20.0
    """Largest request, pictures included, in 10^6 bytes."""
    pixels: int = 32_000_000
    """Of all pictures of a request; decoded one takes three bytes, and more in the processor."""
    images: int = 16
    """Pictures of one request."""
    text: int = 100_000
    """Letters of one request."""
    answer: int = 512
    """Longest answer, in tokens; of a request that names no length, too."""
    seconds: float = 300.0
    """Longest time a request may take from its last byte on; the answer is then cut."""
    upload_seconds: float = 30.0
    """Longest time a request may take to come in."""
    requests: int = 256
    """Requests under way, those that wait included."""
    rate: int = 6000
    """Requests of one client in a minute; a file of short questions comes at many a second."""
    drain_seconds: float = 60.0
    """How long answers under way may go on when the server is told to end."""
    keep_min: float = 0.01
    keep_max: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}: must be above 0, got {value}")
        if not self.keep_min <= self.keep_max <= 1:
            raise ValueError(
                f"keep_min and keep_max: must be in order and at most 1, got {self.keep_min} and "
                f"{self.keep_max}"
            )

    @property
    def body_bytes(self) -> int:
        """`body_mb` in bytes."""
        return int(self.body_mb * 1_000_000)

    def check_keep(self, keep: float) -> None:
        """Refuses a budget that is not offered.

        Raises:
            ValueError: in one sentence.
        """
        if not self.keep_min <= keep <= self.keep_max:
            raise ValueError(
                f"keep: this server takes {self.keep_min:g} to {self.keep_max:g}, got {keep:g}"
            )
