"""Several methods as one: each acts at its own places, such as `visionzip+pyramiddrop`.

`keep` is shared out as a product: a method inside the LLM keeps its share of what the one before
the LLM let in. A part that names its own `keep` has it; the others split the rest evenly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from itprune.calibration import Calibration
from itprune.methods.base import PLACES, Card, Method, Trial
from itprune.options import check_fraction
from itprune.tokens import Images, Kept, LayerTokens, Sparsity

SEPARATOR = "+"


class Combined(Method):
    """Methods that claim different places.

    Raises:
        ValueError: two parts claim the same place, or a part claims none.
    """

    def __init__(self, parts: Mapping[str, Method], keeps: Mapping[str, float | None]) -> None:
        first = next(iter(parts.values()))
        super().__init__(None, first.host)
        self.parts = nn.ModuleDict(dict(parts))
        self.keeps = dict(keeps)
        self.owner = _owners(parts)
        self.places = tuple(self.owner)
        self.card = Card(" + ".join(part.card.title for part in parts.values()))
        self.needs_question = any(p.needs_question for p in parts.values())
        self.needs_patches = any(p.needs_patches for p in parts.values())
        self.look_ahead = "layers" in self.owner and self.at("layers").look_ahead

    def at(self, place: str) -> Method:
        """The part that claims a place."""
        part = self.parts[self.owner[place]]
        assert isinstance(part, Method)
        return part

    def _acting(self, place: str) -> Method | None:
        """The part that claims a place; None: nobody, or one whose share is everything."""
        part = self.at(place) if place in self.owner else None
        return None if part is None or part.idle else part

    def _each(self) -> list[tuple[str, Method]]:
        return [(name, part) for name, part in self.parts.items() if isinstance(part, Method)]

    # ------------------------------------------------------------------------ the dial
    def share(self, keep: float | None) -> None:
        """Hands every part its own target."""
        self.keep = keep
        named = [k for k in self.keeps.values() if k is not None]
        rest = None
        if keep is not None and len(named) < len(self.keeps):
            rest = min(1.0, keep / math.prod(named)) ** (1 / (len(self.keeps) - len(named)))
        for name, part in self._each():
            part.share(
                1.0 if keep == 1.0 else rest if self.keeps[name] is None else self.keeps[name]
            )

    @property
    def idle(self) -> bool:
        return all(part.idle for _, part in self._each())

    # ------------------------------------------------------------------------ places
    def positions_at(self, place: str) -> str:
        return self.at(place).positions_at(place) if place in self.owner else self.positions

    def vision_blocks(self) -> tuple[int, ...]:
        return tuple(sorted({block for _, part in self._each() for block in part.vision_blocks()}))

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        part = self._acting("pixels")
        return (rows, columns) if part is None else part.grid(rows, columns)

    def tower_tokens(self) -> Tensor | None:
        part = self._acting("tower")
        return None if part is None else part.tower_tokens()

    def before_llm(self, images: Images) -> Kept:
        part = self._acting("before_llm")
        return super().before_llm(images) if part is None else part(images)

    def layers(self) -> tuple[int, ...]:
        part = self._acting("layers")
        return () if part is None else part.layers()

    def shares(self) -> tuple[float, ...] | None:
        """Inside the LLM, a share of what the part before it let in."""
        first, later = self._acting("before_llm") or self._acting("pixels"), self._acting("layers")
        let_in = (1.0,) if first is None else first.shares()
        alive = (1.0,) if later is None else later.shares()
        if let_in is None or alive is None:
            return None
        return tuple(let_in[-1] * share for share in alive)

    def after_layer(self, tokens: LayerTokens) -> Kept:
        return self.at("layers").after_layer(tokens)

    @property
    def windowed(self) -> bool:
        return any(part.windowed for _, part in self._each())

    @property
    def attends(self) -> bool:
        return any(part.attends for _, part in self._each())

    def sparsity(self, layer: int) -> Sparsity | None:
        part = self._acting("compute")
        return None if part is None else part.sparsity(layer)

    # ------------------------------------------------------------------------ calibration
    @property
    def calibrates(self) -> bool:
        return any(part.calibrates for _, part in self._each())

    @torch.no_grad()
    def calibrate(self, trial: Trial) -> Calibration:
        """Part by part in the order they act, each behind earlier ones that meet their target."""
        before, found = self.calibration, {}
        try:
            for name, part in sorted(self._each(), key=lambda each: _turn(each[1])):
                if part.calibrates:
                    found[name] = part.calibrate(_Part(trial, (part.keep,)))
                    part.use(found[name])
        except BaseException:
            self.use(before)
            raise
        samples = max(calibration.samples for calibration in found.values())
        return Calibration(samples=samples, found={n: c.to_dict() for n, c in found.items()})

    def use(self, calibration: Calibration | None) -> None:
        super().use(calibration)
        for name, part in self._each():
            record = None if calibration is None else calibration.found.get(name)
            part.use(None if record is None else Calibration.from_dict(record))


@dataclass(frozen=True)
class _Part:
    """A trial of one part, which has a target of its own: its share of the one in force."""

    trial: Trial
    budgets: tuple[float | None, ...]

    def run(self) -> None:
        self.trial.run()

    def fidelity(self) -> float:
        return self.trial.fidelity()


def combine(parts: Mapping[str, Method], options: Mapping[str, Any]) -> Combined:
    """The combination, with each part's own `keep` out of its section of the options."""
    keeps = {name: options.get(name, {}).get("keep") for name in parts}
    for name, keep in keeps.items():
        check_fraction(f"prune.{name}.keep", keep)
    return Combined(parts, keeps)


def _turn(part: Method) -> int:
    """When a part acts first, as an index of `PLACES`."""
    return min(PLACES.index(place) for place in part.places)


def _owners(parts: Mapping[str, Method]) -> dict[str, str]:
    owner: dict[str, str] = {}
    for name, part in parts.items():
        if not part.places:
            raise ValueError(f"prune.method: {name} drops nothing, so it cannot be combined")
        for place in part.places:
            if place in owner:
                where = place.replace("_", " ")
                raise ValueError(
                    f"prune.method: {owner[place]} and {name} both act at the place {where!r}; "
                    "combine methods that act at different places (see `itprune methods`)"
                )
            owner[place] = name
    return owner
