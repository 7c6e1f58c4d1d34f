"""Trained parts of a method, as a submodule of the model they work in.

Under the name `pruner` they move, save, shard and reach the optimiser like any other module; a
method without weights leaves no trace in the model.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from itprune.methods.base import Method

NAME = "pruner"


def is_trained(method: Method) -> bool:
    """Whether a method has weights of its own."""
    return next(method.parameters(), None) is not None


def register_trained(model: nn.Module, inner: PreTrainedModel, method: Method) -> None:
    """Puts a method with weights into the model, on the device of its projector."""
    if not is_trained(method):
        return
    reference = inner.get_input_embeddings().weight
    method.to(reference.device)
    method.train(model.training)
    inner.add_module(NAME, method)


def unregister_trained(inner: PreTrainedModel) -> None:
    """Takes the method out again."""
    if NAME in dict(inner.named_children()):
        delattr(inner, NAME)
