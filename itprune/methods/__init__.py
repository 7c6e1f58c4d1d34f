"""Registry of methods. A new method is one file with one `@register_method("name")`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from itprune.config import COMMON
from itprune.methods.base import Method
from itprune.options import from_mapping, nearest

_REGISTRY: dict[str, type[Method]] = {}


def register_method(name: str) -> Callable[[type[Method]], type[Method]]:
    """Registers a `Method` subclass under a lower-case name; works from outside the package.

    Raises:
        ValueError: a malformed or taken name.
    """

    def register(cls: type[Method]) -> type[Method]:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"method name {name!r}: use lower-case letters, digits, underscores")
        if name in _REGISTRY:
            raise ValueError(f"method name {name!r} is already taken by {_REGISTRY[name]!r}")
        _REGISTRY[name] = cls
        return cls

    return register


def methods() -> tuple[str, ...]:
    """Names of all registered methods."""
    return tuple(sorted(_REGISTRY))


def build_method(name: str, options: Mapping[str, Any], depth: int) -> Method:
    """Builds a method from its plain options.

    Raises:
        ValueError: an unknown method or option, with the nearest valid name.
    """
    if name not in _REGISTRY:
        raise ValueError(f"prune.method: unknown method {name!r}; {nearest(name, _REGISTRY)}")
    cls = _REGISTRY[name]
    return cls(from_mapping(cls.Options, options, "prune", COMMON), depth)


# Importing a method's file registers it.
from itprune.methods import dense, random, topk_cls, two_stage, uniform  # noqa: E402, F401
