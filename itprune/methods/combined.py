"""Several methods as one: each acts at its own places, such as `visionzip+pyramiddrop`.

`keep` is shared out as a product: a method inside the LLM keeps its share of what the one before
the LLM let in. A part that names its own `keep` has it; the others split the rest evenly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from itprune.calibration import Calibration
from itprune.methods.base import Card, Method, Trial
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
        self.look_ahead = "layers" in self.owner and self.at("layers").look_ahead

    def at(self, place: str) -> Method:
        """The part that claims a place."""
        part = self.parts[self.owner[place]]
        assert isinstance(part, Method)
        return part

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
        return self.at(place).positions if place in self.owner else self.positions

    def vision_blocks(self) -> tuple[int, ...]:
        return tuple(sorted({block for _, part in self._each() for block in part.vision_blocks()}))

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        return self.at("pixels").grid(rows, columns) if "pixels" in self.owner else (rows, columns)

    def tower_tokens(self) -> Tensor | None:
        return self.at("tower").tower_tokens() if "tower" in self.owner else None

    def before_llm(self, images: Images) -> Kept:
        return self.at("before_llm")(images)

    def layers(self) -> tuple[int, ...]:
        return self.at("layers").layers() if "layers" in self.owner else ()

    def after_layer(self, tokens: LayerTokens) -> Kept:
        return self.at("layers")(tokens)

    def sparsity(self, layer: int) -> Sparsity | None:
        return self.at("compute").sparsity(layer) if "compute" in self.owner else None

    # ------------------------------------------------------------------------ calibration
    @property
    def calibrates(self) -> bool:
        return any(part.calibrates for _, part in self._each())

    @torch.no_grad()
    def calibrate(self, trial: Trial) -> Calibration:
        found = {n: p.calibrate(trial) for n, p in self._each() if p.calibrates}
        samples = max(calibration.samples for calibration in found.values())
        return Calibration(samples=samples, found={n: c.to_dict() for n, c in found.items()})

    def use(self, calibration: Calibration | None) -> None:
        self.calibration = calibration
        for name, part in self._each():
            record = None if calibration is None else calibration.found.get(name)
            part.use(None if record is None else Calibration.from_dict(record))


def combine(parts: Mapping[str, Method], options: Mapping[str, Any]) -> Combined:
    """The combination, with each part's own `keep` out of its section of the options."""
    keeps = {name: options.get(name, {}).get("keep") for name in parts}
    for name, keep in keeps.items():
        check_fraction(f"prune.{name}.keep", keep)
    return Combined(parts, keeps)


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
