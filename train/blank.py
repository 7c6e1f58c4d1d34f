"""A blank image for batches without one, so that every rank runs the same modules.

Ranks meet in collectives: DDP waits for a gradient of every trained weight, ZeRO-3 for every weight
it gathers, in the same order. A text-only batch on one rank would leave the others waiting. So the
vision modules run on a blank image at the very place of a real one, and their output, times zero,
is added to the embeddings. It also keeps the optimizer's state independent of how rows are batched.
"""

from __future__ import annotations

from typing import Any

from itprune.engine.blank import nothing
from itprune.engine.request import PIXELS
from itprune.families import find_family
from train.model import base_of


class BlankImage:
    """Hooks on the model; active in forwards without pixel values.

    Args:
        model: the model that trains, PEFT-wrapped or not.
        training: also in training mode; else only in evaluation.
    """

    def __init__(self, model: Any, training: bool = True) -> None:
        self.base = base_of(model)
        self.family = find_family(self.base)
        self.training = training
        self.needed = False
        self.base.register_forward_pre_hook(self._look, with_kwargs=True)
        self.family.text_model.register_forward_pre_hook(self._add, with_kwargs=True)

    def _look(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        wanted = self.training or not module.training
        self.needed = wanted and all(kwargs.get(name) is None for name in PIXELS)

    def _add(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if not self.needed:
            return None
        embeds = kwargs["inputs_embeds"]
        return args, {**kwargs, "inputs_embeds": embeds + nothing(self.family, embeds)}
