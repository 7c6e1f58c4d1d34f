"""Trained parts of a method, as a submodule of the model they work in.

Under the name `pruner` they move, save, shard and reach the optimiser like any other module; in a
PEFT model they are one of its modules to save, so every adapter checkpoint has them. A method
without weights leaves no trace in the model.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from itprune.methods.base import Method

NAME = "pruner"


def is_trained(method: Method) -> bool:
    """Whether a method has weights of its own."""
    return next(method.parameters(), None) is not None


def register_trained(model: nn.Module, inner: PreTrainedModel, method: Method) -> Method:
    """Puts a method with weights into the model, on the device and of the type of its embeddings.

    Args:
        model: the model as the user holds it, PEFT-wrapped or not.
        inner: the transformers model inside.
        method: may have no weights; then nothing happens.

    Returns:
        The method to work with from now on (PEFT trains a copy).
    """
    from peft import PeftModel
    from peft.utils import ModulesToSaveWrapper

    if not is_trained(method):
        return method
    embeddings = inner.get_input_embeddings().weight
    method.to(embeddings.device, embeddings.dtype)
    method.train(model.training)
    if not isinstance(model, PeftModel):
        inner.add_module(NAME, method)
        return method
    adapter = model.active_adapter
    wrapper = ModulesToSaveWrapper(method, adapter)
    wrapper.set_adapter(adapter)  # by name: unloading looks it up
    wrapper.original_module = nn.Identity()  # there is no untrained pruner to fall back to
    inner.add_module(NAME, wrapper)
    listed = model.peft_config[adapter].modules_to_save or []
    model.peft_config[adapter].modules_to_save = sorted({*listed, NAME})
    copy = wrapper.modules_to_save[adapter]
    assert isinstance(copy, Method)
    return copy


def unregister_trained(inner: PreTrainedModel, method: Method) -> None:
    """Takes the method out again; another one that is there now stays."""
    child = dict(inner.named_children()).get(NAME)
    if child is not None and any(module is method for module in child.modules()):
        delattr(inner, NAME)


def whole_weights(method: Method) -> dict[str, Tensor]:
    """A method's weights, put together where processes share them (ZeRO-3, FSDP2).

    Every process must call it.
    """
    if is_deepspeed_zero3_enabled():
        import deepspeed  # only then it is certain to be there

        with deepspeed.zero.GatheredParameters(list(method.parameters())):
            return {name: w.detach().cpu().clone() for name, w in method.state_dict().items()}
    return {
        name: (w.full_tensor() if isinstance(w, DTensor) else w).detach().cpu()
        for name, w in method.state_dict().items()
    }
