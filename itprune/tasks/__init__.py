"""Registry of benchmarks. A new one is one file with one `@register_task` on a `Task`."""

from __future__ import annotations

import re
from typing import TypeVar

from itprune.options import nearest
from itprune.plugins import load_plugins
from itprune.tasks.base import Item, Task

__all__ = ["Item", "Task", "find_task", "register_task", "tasks"]

_REGISTRY: dict[str, type[Task]] = {}
AnyTask = TypeVar("AnyTask", bound=type[Task])


def register_task(cls: AnyTask) -> AnyTask:
    """Registers a `Task` subclass under its `name`; works from outside the package.

    Raises:
        ValueError: a malformed or taken name.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", cls.name):
        raise ValueError(f"task name {cls.name!r}: use lower-case letters, digits, underscores")
    if cls.name in _REGISTRY:
        raise ValueError(f"task name {cls.name!r} is already taken by {_REGISTRY[cls.name]!r}")
    _REGISTRY[cls.name] = cls
    return cls


def tasks() -> tuple[str, ...]:
    """Names of all registered tasks, those of installed packages included."""
    load_plugins("itprune.tasks", "task")
    return tuple(sorted(_REGISTRY))


def find_task(name: str) -> type[Task]:
    """The class behind a name.

    Raises:
        ValueError: an unknown name, with the nearest valid one.
    """
    if name not in tasks():
        raise ValueError(f"--task: unknown task {name!r}; {nearest(name, _REGISTRY)}")
    return _REGISTRY[name]


# Importing a task's file registers it.
from itprune.tasks import gqa, mmbench, mme, pope, records, scienceqa, vqa  # noqa: E402, F401
