"""PruneConfig: the `prune` section of a recipe, and what a checkpoint remembers of it.

`keep` is the one dial: a fraction, a Schedule that moves it, or a Draw of one for every step. Keys
that are not common to all methods are the method's own options and sit beside `keep` in YAML; the
method validates them when it is built.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from itprune.options import check_choice, check_fraction, from_mapping, to_plain

POSITIONS = ("original", "contiguous")
LAYOUTS = ("packed", "padded")
VIDEO = ("frame", "clip")
LABEL_ONLY_LOGITS = ("pruned", "always", "never")
SHAPES = ("linear", "cosine")
COMMON = ("method", "keep", "positions", "video", "layout", "label_only_logits")
"""Keys of the `prune` section that every method has."""


@dataclass(frozen=True)
class Schedule:
    """`keep` over training progress: from `start` to `to`, reached at progress `until`.

    Written `{from: 1.0, to: 0.22, shape: cosine, until: 0.5}`; after training `to` holds.
    """

    to: float
    start: float = 1.0
    shape: str = "linear"
    until: float = 1.0

    def __post_init__(self) -> None:
        check_fraction("prune.keep.from", self.start)
        check_fraction("prune.keep.to", self.to)
        check_fraction("prune.keep.until", self.until)
        check_choice("prune.keep.shape", self.shape, SHAPES)

    @property
    def final(self) -> float:
        """The target after training."""
        return self.to

    @property
    def budgets(self) -> tuple[float, ...]:
        """Targets it passes: its ends and what lies between them."""
        return self.start, (self.start + self.to) / 2, self.to

    def at(self, step: int, total: int, seed: int = 0) -> float:
        """The target of step 0 … total - 1; from `total` on, what holds after training."""
        done = min(max(step / max(total, 1) / self.until, 0.0), 1.0)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start * (1 - done) + self.to * done  # exact at both ends

    def to_plain(self) -> dict[str, Any]:
        return {"from": self.start, "to": self.to, "shape": self.shape, "until": self.until}


@dataclass(frozen=True)
class Draw:
    """`keep` drawn anew for every step, so that one model learns to run on many budgets.

    Written `[0.22, 0.11, 0.44, 1.0]`; each is drawn equally often, one that stands twice twice as
    often. After training the first one holds, unless another is asked for.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("prune.keep: the list is empty; name the fractions to draw from")
        for i, value in enumerate(self.values):
            if value is None:
                raise ValueError(f"prune.keep[{i}]: must be a fraction in (0, 1], got null")
            check_fraction(f"prune.keep[{i}]", value)

    @property
    def final(self) -> float:
        """The target after training."""
        return self.values[0]

    @property
    def budgets(self) -> tuple[float, ...]:
        """Targets it draws from."""
        return self.values

    def at(self, step: int, total: int, seed: int = 0) -> float:
        """The target of step 0 … total - 1; from `total` on, what holds after training.

        By step and seed alone: all processes draw the same, and so does a run that goes on.
        """
        if step >= total:
            return self.final
        return random.Random(f"keep {seed} {step}").choice(self.values)

    def to_plain(self) -> list[float]:
        return list(self.values)


@dataclass(frozen=True)
class PruneConfig:
    """How tokens are chosen and how the model runs on the ones that stay.

    Raises:
        ValueError: a value outside its range, in one sentence.
    """

    method: str = "itprune"
    """Name of a registered method; `itprune.methods()` lists them. Several that act at different
    places are joined by `+` (in YAML also a list); their options are then sections."""
    keep: float | Schedule | Draw | None = 0.22
    """Average fraction of visual tokens kept, averaged over the LLM's layers; None: the method's
    own rule decides; a Schedule: moves with training; a Draw (in YAML a list): one for every step,
    the first for inference. 1.0 is exactly the dense model."""
    positions: str | None = None
    """Position ids of what stays: original, contiguous (renumbered after each drop), or null: as
    the method was published."""
    video: str = "frame"
    """What a budget is for in a video: frame, each frame has its own; clip, all frames share one,
    so that frames which say more keep more."""
    layout: str = "packed"
    """packed: one row of all samples' tokens, no padding; padded: rows padded to the longest."""
    label_only_logits: str = "pruned"
    """Compute training logits at supervised positions only: while something is pruned, always,
    never."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The method's own options."""

    def __post_init__(self) -> None:
        if isinstance(self.keep, Mapping):
            object.__setattr__(self, "keep", _schedule(self.keep))
        elif isinstance(self.keep, list | tuple):
            object.__setattr__(self, "keep", _draw(self.keep))
        elif not isinstance(self.keep, Schedule | Draw):
            check_fraction("prune.keep", self.keep)
        if self.positions is not None:
            check_choice("prune.positions", self.positions, POSITIONS)
        check_choice("prune.video", self.video, VIDEO)
        check_choice("prune.layout", self.layout, LAYOUTS)
        check_choice("prune.label_only_logits", self.label_only_logits, LABEL_ONLY_LOGITS)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruneConfig:
        """Reads the flat form of YAML and pruner.json."""
        if not isinstance(values, Mapping):
            raise ValueError(f"prune: must be a mapping of options, got {values!r}")
        known = {k: v for k, v in values.items() if k in COMMON}
        if isinstance(known.get("keep"), str):
            known["keep"] = _number("prune.keep", known["keep"])
        if isinstance(known.get("method"), list) and known["method"]:
            known["method"] = "+".join(map(str, known["method"]))
        if known.get("positions", "") is None:
            del known["positions"]
        for key in known.keys() - {"keep"}:
            if not isinstance(known[key], str):
                raise ValueError(f"prune.{key}: must be a name, got {known[key]!r}")
        return cls(**known, options={k: v for k, v in values.items() if k not in COMMON})

    def to_dict(self) -> dict[str, Any]:
        """The flat form; `from_dict` gives an equal config back."""
        keep = self.keep.to_plain() if isinstance(self.keep, Schedule | Draw) else self.keep
        return {
            "method": self.method,
            "keep": keep,
            "positions": self.positions,
            "video": self.video,
            "layout": self.layout,
            "label_only_logits": self.label_only_logits,
            **to_plain(dict(self.options)),
        }

    def replace(self, **changes: Any) -> PruneConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def keep_at(self, step: int, total: int, seed: int = 0) -> float | None:
        """The target in force in training step 0 … total - 1; from `total` on, after training.

        Args:
            step: optimizer steps done before.
            total: optimizer steps of the whole training.
            seed: of the run; a Draw differs by it.
        """
        if isinstance(self.keep, Schedule | Draw):
            return self.keep.at(step, total, seed)
        return self.keep

    @property
    def final_keep(self) -> float | None:
        """The target after training: what inference and merged checkpoints use by default."""
        return self.keep.final if isinstance(self.keep, Schedule | Draw) else self.keep

    @property
    def budgets(self) -> tuple[float | None, ...]:
        """The targets that training meets; of a Schedule its ends and its middle."""
        return self.keep.budgets if isinstance(self.keep, Schedule | Draw) else (self.keep,)


def _schedule(values: Mapping[str, Any]) -> Schedule:
    renamed = {"start" if k == "from" else k: v for k, v in values.items()}
    if "start" in values or "to" not in values:
        raise ValueError("prune.keep: a schedule is written {from: 1.0, to: 0.22, shape: linear}")
    return from_mapping(Schedule, renamed, "prune.keep")


def _draw(values: Sequence[Any]) -> Draw:
    """Numbers such as 1e-1 are text in YAML."""
    return Draw(
        tuple(
            _number(f"prune.keep[{i}]", value) if isinstance(value, str) else value
            for i, value in enumerate(values)
        )
    )


def _number(where: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{where}: must be a fraction in (0, 1], got {text!r}") from None
