"""Methods, families and tasks of other installed packages: they are named under an entry-point
group, so that nothing needs to be imported by hand."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import entry_points


@cache
def load_plugins(group: str, kind: str) -> None:
    """Imports what packages offer, once; what is broken is told of and left out.

    Args:
        group: the entry-point group, such as `itprune.methods`.
        kind: what stands in it, for the message.
    """
    for point in entry_points(group=group):
        try:
            point.load()
        except Exception as error:  # noqa: BLE001 - a package that is not ours may raise anything
            warnings.warn(
                f"{kind} {point.name!r} of {point.value} is left out: {error}", stacklevel=3
            )
