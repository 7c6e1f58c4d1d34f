"""Registry of methods. A new method is one file with one `@register_method("name")`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from itprune.config import COMMON
from itprune.methods.base import Host, Method
from itprune.options import from_mapping, nearest
from itprune.plugins import load_plugins

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
    """Names of all registered methods, those of installed packages included."""
    load_plugins("itprune.methods", "method")
    return tuple(sorted(_REGISTRY))


def method_class(name: str) -> type[Method]:
    """The class behind a name.

    Raises:
        ValueError: an unknown name, with the nearest valid one.
    """
    if name not in methods():
        raise ValueError(f"prune.method: unknown method {name!r}; {nearest(name, _REGISTRY)}")
    return _REGISTRY[name]


def build_method(name: str, options: Mapping[str, Any], host: Host) -> Method:
    """Builds a method, or several joined by `+`, from plain options.

    Args:
        name: a registered name; `a+b` combines methods that act at different places, and their
            options are then sections under their names.
        options: the options of the `prune` section that are not common to all methods.
        host: the shape of the model.

    Raises:
        ValueError: an unknown method or option, with the nearest valid name.
    """
    names = name.split(SEPARATOR)
    if len(names) == 1:
        cls = method_class(name)
        return cls(from_mapping(cls.Options, options, "prune", COMMON), host)
    unknown = [key for key in options if key not in names]
    if unknown:
        raise ValueError(
            f"prune.{unknown[0]}: unknown option; the options of {name} are sections named "
            + ", ".join(names)
        )
    if len(set(names)) < len(names):
        raise ValueError(f"prune.method: {name} names a method twice")
    parts = {part: _build_part(part, options.get(part, {}), host) for part in names}
    return combine(parts, options)


def _build_part(name: str, options: Any, host: Host) -> Method:
    cls = method_class(name)
    if not isinstance(options, Mapping):
        raise ValueError(f"prune.{name}: must be a mapping of options, got {options!r}")
    own = {key: value for key, value in options.items() if key != "keep"}
    return cls(from_mapping(cls.Options, own, f"prune.{name}", ("keep",)), host)


# Importing a method's file registers it.
from itprune.methods import (  # noqa: E402
    aim,  # noqa: F401
    cdpruner,  # noqa: F401
    dense,  # noqa: F401
    divprune,  # noqa: F401
    downsample,  # noqa: F401
    dyvte,  # noqa: F401
    fastv,  # noqa: F401
    gsearch,  # noqa: F401
    p_sigmoid,  # noqa: F401
    prumerge,  # noqa: F401
    prumerge_plus,  # noqa: F401
    pyramiddrop,  # noqa: F401
    quecc,  # noqa: F401
    random,  # noqa: F401
    setok,  # noqa: F401
    sparsevlm,  # noqa: F401
    topk_cls,  # noqa: F401
    two_stage,  # noqa: F401
    uniform,  # noqa: F401
    visionzip,  # noqa: F401
    vistog,  # noqa: F401
    vtc_cls,  # noqa: F401
    yopo,  # noqa: F401
)
from itprune.methods.combined import SEPARATOR, combine  # noqa: E402
