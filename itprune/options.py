"""Strict options: a mapping from YAML or JSON becomes a frozen dataclass, or one clear sentence.

A misspelt key in an experiment is a wrong experiment, so unknown keys are refused with the nearest
valid name, and `1e-4`, which YAML reads as text, becomes a number where the field is one.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
LARGEST = 2**63 - 1
"""Integers end up in tensors of int64."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error sentence: the closest valid name, then all of them."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(names)}"


def check_choice(where: str, value: str, valid: Iterable[str]) -> None:
    """Raises ValueError when `value` is not one of `valid`."""
    valid = list(valid)
    if value not in valid:
        raise ValueError(f"{where}: unknown value {value!r}; {nearest(str(value), valid)}")


def check_fraction(where: str, value: float | None) -> None:
    """Raises ValueError unless `value` is None or in (0, 1]."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"{where}: must be a fraction in (0, 1], got {value!r}")


def check_positive(where: str, value: int | None) -> None:
    """Raises ValueError unless `value` is None or a count of at least 1."""
    if value is not None and value < 1:
        raise ValueError(f"{where}: must be at least 1, got {value}")


def from_mapping(
    cls: type[T], values: Mapping[str, Any], where: str, siblings: Iterable[str] = ()
) -> T:
    """Builds the dataclass `cls` from plain values.

    Args:
        cls: a dataclass whose field types are plain types, nested dataclasses or unions with None.
        values: what the YAML or JSON held.
        where: the path of the section, for error messages ("prune.stage1").
        siblings: keys valid beside these but read elsewhere, for the hint in an error message.

    Raises:
        ValueError: an unknown key or a value of the wrong type, in one sentence.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: must be a mapping of options, got {values!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise ValueError(
                f"{where}: unknown option {key!r}; {nearest(str(key), [*names, *siblings])}"
            )
    return cls(**{k: _convert(hints[k], v, f"{where}.{k}") for k, v in values.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    members = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in members:
        return None
    for member in members:
        if dataclasses.is_dataclass(member) and isinstance(member, type):
            return value if isinstance(value, member) else from_mapping(member, value, where)
        if typing.get_origin(member) is tuple and isinstance(value, list | tuple):
            inner = typing.get_args(member)[0]
            return tuple(_convert(inner, v, f"{where}[{i}]") for i, v in enumerate(value))
    if bool in members and isinstance(value, bool):
        return value
    if int in members and type(value) is int and abs(value) <= LARGEST:
        return value
    if float in members and (number := _finite(value)) is not None:
        return number
    if str in members and isinstance(value, str):
        return value
    wanted = " or ".join("null" if m is type(None) else _name(m) for m in members)
    limits = " (finite, of at most 64 bits)" if type(value) in (int, float) else ""
    shown = repr(value)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
    raise ValueError(f"{where}: must be {wanted}{limits}, got {shown}")


def _finite(value: Any) -> float | None:
    """The number a value stands for, be it written as text; None: not a finite one."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return "a list"
    return kind.__name__ if isinstance(kind, type) else str(kind)


def to_plain(value: Any) -> Any:
    """The reverse of `from_mapping`: dataclasses become dicts, tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    return value
