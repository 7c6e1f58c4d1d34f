"""The one interface every token-reduction method fits.

A method says what it needs (blocks of the vision encoder, the question, LLM layers), gets it as
plain tensors and answers which tokens stay and what they hold. It never imports a model; the
engine supplies what is declared and does the physical work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from itprune.calibration import Calibration, Recorder
from itprune.host import Host as Host
from itprune.tokens import Images, Kept, LayerTokens, Sparsity, keep_all, keep_every

PLACES = ("pixels", "tower", "before_llm", "layers", "compute")
"""Where a method may act: on the image's size, inside the vision encoder, between encoder and LLM,
between LLM layers, on what a layer computes for tokens that stay."""


@dataclass(frozen=True)
class Card:
    """What a user wants to know before choosing a method."""

    title: str
    """One line."""
    paper: str = ""
    """arXiv id."""
    count: str = "static"
    """static, dynamic (differs by sample) or schedule (differs by layer)."""
    training: str = "none"
    """none, optional, required or calibration."""
    needs: tuple[str, ...] = ()
    """What a model or sample must have: cls, question, grid."""
    notes: str = ""
    """Fidelity: what differs from the published system."""


@dataclass(frozen=True)
class NoOptions:
    """A method without options of its own."""


class Trial(Protocol):
    """What a method may do while it is calibrated."""

    @property
    def budgets(self) -> tuple[float | None, ...]:
        """Targets to be met, that in force first."""

    def run(self) -> None:
        """Forwards every calibration batch."""

    def fidelity(self) -> float:
        """Forwards every calibration batch; agreement with the dense model, 1 = the same."""


class Method(nn.Module):
    """Base of all methods. A module: trained parts move, save and shard like any other.

    Attributes:
        keep: the target average in force (None: the method's own rule), set by the engine.
        calibration: what `calibrate` found, where the method has one.
        recorder: set while calibrating.
    """

    Options: ClassVar[type] = NoOptions
    card: Card = Card("a method without a description")
    places: tuple[str, ...] = ()
    """Which of `PLACES` it claims; the engine asks for nothing else."""
    positions: ClassVar[str] = "original"
    """Position ids of what stays: original, or contiguous (renumbered after each drop)."""
    needs_question: bool = False
    """`Images.question` and `Images.instruction` are used."""
    needs_patches: bool = False
    """`Images.block` is used, or patches one by one: for models whose visual tokens are those."""
    look_ahead: bool = False
    """After layer k the scores come from the q and k of layer k + 1, not of layer k."""

    def __init__(self, options: Any, host: Host) -> None:
        """Args: `options`, an instance of `Options`; `host`, the model's shape."""
        super().__init__()
        self.options = options
        self.host = host
        self.depth = host.depth
        self.keep: float | None = None
        self.calibration: Calibration | None = None
        self.recorder: Recorder | None = None

    @property
    def idle(self) -> bool:
        """True when nothing would be dropped: the engine then leaves the model untouched."""
        return self.keep == 1.0 and self.recorder is None

    def share(self, keep: float | None) -> None:
        """Sets the target average."""
        self.keep = keep

    def use(self, calibration: Calibration | None) -> None:
        """Sets the calibration in force.

        Raises:
            ValueError: it was made with a model of another shape.
        """
        if calibration is not None and calibration.host not in ({}, self.host.to_dict()):
            raise ValueError(
                "calibration: it was made with another model "
                f"({calibration.host.get('depth')} LLM layers of width "
                f"{calibration.host.get('width')}, "
                f"here {self.depth} of {self.host.width}); run `itprune calibrate` on this one"
            )
        self.calibration = calibration

    @property
    def acts_before_llm(self) -> bool:
        """Whether one of its places is before the LLM."""
        return not {"pixels", "tower", "before_llm"}.isdisjoint(self.places)

    def shares(self) -> tuple[float, ...] | None:
        """Fractions of the visual tokens it aims at on average: into the LLM, and behind each of
        `layers()`; None: only the samples decide."""
        if self.keep is None or self.layers() or not self.acts_before_llm:
            return None
        return (self.keep,)

    def positions_at(self, place: str) -> str:
        """The position policy of what is dropped at one of its places."""
        return self.positions

    # ------------------------------------------------------------------------ vision encoder
    def vision_blocks(self) -> tuple[int, ...]:
        """0-based encoder blocks whose q, k and output are needed."""
        return (self.host.feature_block,)

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Place `pixels`: the grid of patches an image is resized to."""
        return rows, columns

    def tower_tokens(self) -> Tensor | None:
        """Place `tower`: (S, D) tokens appended to the encoder's embeddings.

        They attend to everything; patches and CLS never attend to them.
        """
        return None

    # ------------------------------------------------------------------------ selection
    def before_llm(self, images: Images) -> Kept:
        """What enters the LLM."""
        return keep_all(images)

    def layers(self) -> tuple[int, ...]:
        """0-based LLM layers after which `after_layer` is asked."""
        return ()

    def after_layer(self, tokens: LayerTokens) -> Kept:
        """What goes on to all later layers. Protected tokens stay anyway.

        Asked directly, not through `forward`: a batch of text does not come by here, and DeepSpeed
        compares which modules ran on each rank. Weights used here stand in a module of their own.
        """
        return keep_every(tokens)

    @property
    def windowed(self) -> bool:
        """Place `compute`: windows between visual tokens, which needs to know where these stand."""
        return False

    @property
    def attends(self) -> bool:
        """Place `compute`: some layer attends otherwise than the host's own kernel does."""
        return False

    def sparsity(self, layer: int) -> Sparsity | None:
        """Place `compute`: what layer `layer` spares on visual tokens."""
        return None

    def forward(self, seen: Images | LayerTokens) -> Kept:
        """How the engine asks before the LLM, so that wrappers which gather sharded weights are
        met; a batch of text asks about a blank image."""
        return self.before_llm(seen) if isinstance(seen, Images) else self.after_layer(seen)

    # ------------------------------------------------------------------------ calibration
    @property
    def calibrates(self) -> bool:
        """Whether `calibrate` has anything to find."""
        return False

    @torch.no_grad()
    def calibrate(self, trial: Trial) -> Calibration:
        """Fits the method to the calibration batches.

        Raises:
            ValueError: there is nothing to find.
        """
        raise ValueError(f"{type(self).__name__}: this method has nothing to calibrate")
