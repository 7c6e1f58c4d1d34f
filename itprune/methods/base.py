"""The one interface every token-reduction method fits.

A method answers two questions about plain tensors: which visual tokens enter the LLM
(`before_llm`), and which tokens go on after an LLM layer (`after_layer`). It never imports a model;
the engine supplies what it declares and does the physical work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from itprune.calibration import Calibration, Recorder
from itprune.tokens import Images, Kept, LayerTokens, keep_all


@dataclass(frozen=True)
class NoOptions:
    """A method without options of its own."""


class Method(nn.Module):
    """Base of all methods. A module, so that trained parts move, save and shard like any other.

    Attributes:
        keep: the target average in force (None: the method's own rule), set by the engine.
        calibration: counts-to-target record, where the method has one.
        recorder: set while calibrating.
    """

    Options: ClassVar[type] = NoOptions
    acts_before_llm: ClassVar[bool] = False
    """Whether `before_llm` has anything to say; the vision hooks idle otherwise."""

    def __init__(self, options: Any, depth: int) -> None:
        """Args: `options`, an instance of `Options`; `depth`, the number of LLM layers."""
        super().__init__()
        self.options = options
        self.depth = depth
        self.keep: float | None = None
        self.calibration: Calibration | None = None
        self.recorder: Recorder | None = None

    @property
    def idle(self) -> bool:
        """True when nothing would be dropped: the engine then leaves the model untouched."""
        return self.keep == 1.0 and self.recorder is None

    def layers(self) -> tuple[int, ...]:
        """0-based LLM layers after which `after_layer` is asked."""
        return ()

    def calibration_stages(self) -> tuple[str, ...]:
        """Names of the stages whose counts a calibration can scale, in the order they act."""
        return ()

    @torch.no_grad()
    def before_llm(self, images: Images) -> Kept:
        """Stage 1: which of the images' tokens enter the LLM."""
        return keep_all(images)

    @torch.no_grad()
    def after_layer(self, tokens: LayerTokens) -> Tensor:
        """Stage 2: (N,) bool, which of the tokens alive go on. Protected ones stay anyway."""
        return torch.ones(len(tokens.sample), dtype=torch.bool, device=tokens.sample.device)
