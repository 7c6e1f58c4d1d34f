"""A YAML file with memory: plain values, and the line every key came from.

A refused key is reported as FILE:LINE, and a key that is written twice, of which YAML would
silently keep the last, is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


class Source:
    """The values of a YAML file after command line overrides.

    Attributes:
        values: the nested plain values.
    """

    def __init__(self, path: Path, values: dict[str, Any], lines: dict[str, int]) -> None:
        self.path = path
        self.values = values
        self._lines = lines
        self._overridden: set[str] = set()

    def where(self, key: str) -> str:
        """The place of a dotted key: "command line" or FILE:LINE of the closest known key."""
        key = key.partition("[")[0]  # a list has one place, not one for each entry
        while key:
            if key in self._overridden:
                return "command line"
            if key in self._lines:
                return f"{self.path}:{self._lines[key]}"
            key = key.rpartition(".")[0]
        return str(self.path)

    def override(self, text: str) -> None:
        """Applies one `section.key=value`; the value is read as YAML.

        Raises:
            ValueError: the text is not of that form, or goes through a value that has no keys.
        """
        key, equals, value = text.partition("=")
        if not equals or not key or not all(key.split(".")):
            raise ValueError(f"command line: {text!r} is not of the form section.key=value")
        *parents, last = key.split(".")
        node = self.values
        for i, name in enumerate(parents):
            child = node.get(name)
            if child is None:
                child = node[name] = {}
                self._overridden.add(".".join(parents[: i + 1]))
            if not isinstance(child, dict):
                raise ValueError(
                    f"command line: {'.'.join(parents[: i + 1])} is {child!r} and has no keys"
                )
            node = child
        try:
            node[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"command line: {key}: cannot read {value!r} as YAML") from None
        self._overridden.add(key)


def read_yaml(path: Path) -> Source:
    """Reads `path`, whose top level must be a mapping.

    Raises:
        ValueError: no such file, a syntax error at line n, a key written twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read the recipe ({_reason(error)})") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[str, int] = {}
        if node is not None:
            _walk(node, "", lines, path)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = mark.line + 1 if mark is not None else 1
        raise ValueError(f"{path}:{line}: not valid YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold sections (model, data, trainer, ...)")
    return Source(path, values, lines)


def _walk(node: yaml.Node, prefix: str, lines: dict[str, int], path: Path) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        line = key.start_mark.line + 1
        if name in lines:
            raise ValueError(f"{path}:{line}: {name} is already set at line {lines[name]}")
        lines[name] = line
        _walk(value, f"{name}.", lines, path)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "not UTF-8 text"
