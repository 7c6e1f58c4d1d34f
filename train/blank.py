"""A blank image for batches without one, so that every rank runs the same modules.

Ranks meet in collectives: DDP waits for a gradient of every trained weight, ZeRO-3 for every weight
it gathers, in the same order. A text-only batch on one rank would leave the others waiting. So the
vision modules run on a blank image at the very place of a real one, and their output, times zero,
is added to the embeddings. It also keeps the optimizer's state independent of how rows are batched.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from train.model import base_of


class BlankImage:
    """Hooks on the model; active in forwards without pixel values.

    Args:
        model: the model that trains, PEFT-wrapped or not.
        processor: makes the image inputs.
        training: also in training mode; else only in evaluation.
    """

    def __init__(self, model: Any, processor: Any, training: bool = True) -> None:
        self.base = base_of(model)
        image = Image.new("RGB", (64, 64))
        self.inputs = dict(processor.image_processor(images=[image], return_tensors="pt"))
        self.training = training
        self.needed = False
        self.base.register_forward_pre_hook(self._look, with_kwargs=True)
        self.base.get_decoder().register_forward_pre_hook(self._add, with_kwargs=True)

    def _look(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        wanted = self.training or not module.training
        self.needed = wanted and kwargs.get("pixel_values") is None

    def _add(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if not self.needed:
            return None
        embeds = kwargs["inputs_embeds"]
        inputs = {key: value.to(embeds.device) for key, value in self.inputs.items()}
        output = self.base.get_image_features(**inputs).pooler_output
        features = output if isinstance(output, torch.Tensor) else torch.cat(tuple(output))
        nothing = (0.0 * features.sum()).to(embeds.dtype)
        return args, {**kwargs, "inputs_embeds": embeds + nothing}
