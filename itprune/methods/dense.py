"""`dense`: the control that drops nothing."""

from __future__ import annotations

from itprune.methods import register_method
from itprune.methods.base import Method


@register_method("dense")
class Dense(Method):
    """Keeps every token, whatever `keep` says."""

    @property
    def idle(self) -> bool:
        return True
