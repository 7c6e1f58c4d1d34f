"""The engine: makes a stock transformers model run on kept tokens only.

The host keeps believing in the full sequence (virtual); its decoder layers see short tensors
(physical). Read `engine.py` (hooks) first, then `context.py` (one forward), then the rest.
"""

from itprune.engine.engine import Engine

__all__ = ["Engine"]
