"""`dense`: the control that drops nothing."""

from __future__ import annotations

from itprune.methods import register_method
from itprune.methods.base import Card, Method


@register_method("dense")
class Dense(Method):
    """Keeps every token, whatever `keep` says."""

    card = Card("control: nothing is dropped")

    @property
    def idle(self) -> bool:
        return True
