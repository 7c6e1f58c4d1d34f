"""What is compared: entries (a method with options), at budgets, with seeds; each is one case.

An entry is written `name`, `name:option=value:section.option=value`, or several names joined by
`+`; values are JSON (`2`, `true`, `null`, `[4,8]`), anything else is text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from itprune.config import PruneConfig
from itprune.host import Host
from itprune.methods import build_method
from itprune.methods.base import Method
from itprune.options import check_fraction

DENSE = "dense"
CONTROLS = ("random", "downsample")
VERY_DEEP = 1024
"""Layers of the model options are checked against before one is loaded."""


@dataclass(frozen=True)
class Entry:
    """A method as the user wrote it."""

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Entry:
        """Reads `name:option=value`.

        Raises:
            ValueError: malformed, unknown method or option.
        """
        method, *parts = _split(text.strip(), ":")
        options: dict[str, Any] = {}
        for part in parts:
            path, equals, value = part.partition("=")
            if not equals or not path:
                raise ValueError(
                    f"--methods: {text!r}: options are written name:option=value, got {part!r}"
                )
            _put(options, path.split("."), value, text)
        entry = cls(text.strip(), method, options)
        entry.probe()
        return entry

    def config(self, keep: float | None, seed: int | None = None) -> PruneConfig:
        """How to attach it. Logits at supervised positions only, so that a training step is
        compared for its tokens and not for its head."""
        seeded = {} if seed is None else {"seed": seed}
        values = {"label_only_logits": "always", **self.options, **seeded}
        return PruneConfig.from_dict({**values, "method": self.method, "keep": keep})

    def probe(self) -> Method:
        """The method on a model with room for every option; weights without memory.

        Raises:
            ValueError: unknown method or option.
        """
        config = self.config(0.5)
        host = dataclasses.replace(Host.example(), depth=VERY_DEEP)
        with torch.device("meta"):
            return build_method(config.method, config.options, host)

    @property
    def seeded(self) -> bool:
        """Whether its choice hangs on a seed the user left open. A search's seed does not count:
        it is run once, as the user of the method would."""
        method = self.probe()
        names = {field.name for field in dataclasses.fields(type(method).Options)}
        return "seed" in names - self.options.keys() and method.card.training == "none"


@dataclass(frozen=True)
class Case:
    """One entry at one budget with one seed."""

    entry: Entry
    keep: float
    seed: int | None = None

    @property
    def name(self) -> str:
        """For messages."""
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.entry.label} at {self.keep:g}{seed}"

    def config(self) -> PruneConfig:
        return self.entry.config(self.keep, self.seed)

    def key(self, run: str) -> str:
        """Its row's key: 16 hexadecimal digits of what decides the answers.

        Args:
            run: fingerprint of model, data and settings.
        """
        text = json.dumps([run, self.config().to_dict()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_entries(text: str) -> list[Entry]:
    """The entries of a comma-separated list, `dense` and both controls first.

    Raises:
        ValueError: malformed, unknown method or option.
    """
    given = [part for part in _split(text, ",") if part.strip()]
    names = dict.fromkeys([DENSE, *CONTROLS, *(part.strip() for part in given)])
    return [Entry.parse(name) for name in names]


def make_cases(
    entries: Sequence[Entry], keeps: Iterable[float], seeds: Sequence[int]
) -> list[Case]:
    """Every entry at every budget: dense once, entries with a seed once for each seed.

    Raises:
        ValueError: a budget outside (0, 1].
    """
    keeps = sorted(set(keeps))
    for keep in keeps:
        check_fraction("--keep", keep)
    cases = []
    for entry in entries:
        drawn: Sequence[int | None] = seeds if entry.seeded else [None]
        budgets = [1.0] if entry.method == DENSE else keeps
        cases += [Case(entry, keep, seed) for keep in budgets for seed in drawn]
    return cases


def _split(text: str, at: str) -> list[str]:
    """Splits outside brackets and quotes."""
    pieces, depth, quoted = [""], 0, False
    for letter in text:
        quoted ^= letter == '"'
        depth += (letter in "[{") - (letter in "]}")
        if letter == at and not depth and not quoted:
            pieces.append("")
        else:
            pieces[-1] += letter
    return pieces


def _put(options: dict[str, Any], path: Sequence[str], value: str, where: str) -> None:
    for name in path[:-1]:
        options = options.setdefault(name, {})
        if not isinstance(options, dict):
            raise ValueError(f"--methods: {where!r}: {name} is a value and a section at once")
    try:
        options[path[-1]] = json.loads(value)
    except json.JSONDecodeError:
        options[path[-1]] = value
