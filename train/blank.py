"""A blank image for batches without one, so that every rank runs the same modules.

Ranks meet in collectives: DDP waits for a gradient of every trained weight, ZeRO-3 for every weight
it gathers, in the same order. A text-only batch on one rank would leave the others waiting. So the
vision modules run on a blank image at the very place of a real one, and their output, times zero,
is added to the embeddings. It also keeps the optimizer's state independent of how rows are batched.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from itprune.engine.blank import nothing
from itprune.engine.request import PIXELS
from itprune.families import find_family
from itprune.methods.base import Method
from train.model import base_of, trains_images


class BlankImage:
    """Hooks on the model; active in forwards without pixel values.

    Args:
        model: the model that trains, PEFT-wrapped or not.
        training: also in training mode; else only in evaluation.
        alike: under ZeRO-3 the method, since no rank may run a module that another does not.

    Raises:
        ValueError: it has trained parts for which there is no such guarantee.
    """

    def __init__(self, model: Any, training: bool = True, alike: Method | None = None) -> None:
        if alike is not None:
            check_ranks(alike)
        self.alike = alike
        self.base = base_of(model)
        self.family = find_family(self.base)
        self.training = training
        self.needed = False
        self.base.register_forward_pre_hook(self._look, with_kwargs=True)
        self.family.text_model.register_forward_pre_hook(self._add, with_kwargs=True)

    def _look(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        text = all(kwargs.get(name) is None for name in PIXELS)
        if text and self.alike is not None and self.alike.look_ahead and not self.alike.idle:
            raise ValueError(
                "prune.method: it scores tokens by the layer ahead, so images run modules that "
                "text does not, and under ZeRO-3 ranks must run the same; use ZeRO-2 or FSDP2, or "
                "leave text-only samples out"
            )
        self.needed = text and (self.training or not module.training)

    def _add(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if not self.needed:
            return None
        embeds = kwargs["inputs_embeds"]
        return args, {**kwargs, "inputs_embeds": embeds + nothing(self.family, embeds)}


def blank_images(
    model: Any, attached: Any | None, *, fsdp: bool, routing: bool, processes: int
) -> None:
    """Puts the hooks where a run needs them.

    In training on several ranks the pruner does the same by itself.

    Args:
        model: the model that trains.
        attached: its pruner, if there is one.
        fsdp: whether FSDP2 shards it.
        routing: whether exit routers are all that trains.
        processes: of the run.

    Raises:
        ValueError: a method that batches of text cannot be reconciled with.
    """
    zero3 = is_deepspeed_zero3_enabled()
    if (trains_images(model) and not routing) or zero3 or fsdp:
        alike = attached.method if zero3 and attached is not None and not routing else None
        BlankImage(model, training=attached is None or processes == 1, alike=alike)


def check_ranks(method: nn.Module) -> None:
    """Refuses under ZeRO-3 what no blank image helps against.

    Raises:
        ValueError: trained parts that work inside the LLM, where each batch decides for itself
            which of them run.
    """
    for part in method.modules():
        inside = isinstance(part, Method) and "layers" in part.places
        if inside and not _parts(part) and next(part.parameters(), None) is not None:
            raise ValueError(
                "prune.method: its trained parts decide inside the language model which of them "
                "run, and under ZeRO-3 all ranks must run the same; use ZeRO-2 or FSDP2"
            )


def _parts(method: nn.Module) -> list[nn.Module]:
    """The methods a combined one is made of."""
    return [part for part in method.modules() if isinstance(part, Method) and part is not method]
