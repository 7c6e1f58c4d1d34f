"""Weights on disk: what a checkpoint holds, whoever shards the run, and how it comes back.

A saved folder is complete under every launcher: its safetensors hold whole weights under the names
the model was published with, the trained parts of a method lie beside them, and nothing has to be
consolidated afterwards. What DeepSpeed and FSDP write beside that (optimizer state, shards) is only
for going on, with the same launcher.

Reading a checkpoint back is ours, too: Trainer fills a model by the names of its modules, a file
holds those the model was published with, and what does not match would stay as it was silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from train.fsdp import open_to_cpu, set_plan
from train.model import load_whole
from train.pruning import load_parts


class SavingTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose folders are complete.

    Args:
        save_beside: writes pruner, processor and recipe into a folder (main process only); it is
            handed the pruner's weights where they had to be gathered from several ranks.
        method: what is attached, if it has parts that train.
        layers: under FSDP2 the class names of what is sharded one by one; else None.
    """

    def __init__(
        self,
        *args: Any,
        save_beside: Callable[[Path, Mapping[str, Tensor] | None], None],
        method: nn.Module | None = None,
        layers: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.layers = layers
        super().__init__(*args, **kwargs)
        self.save_beside = save_beside
        self.method = method

    def create_accelerator_and_postprocess(self) -> None:
        if self.layers is not None:
            open_to_cpu(self.args)
        super().create_accelerator_and_postprocess()
        if self.layers is not None:
            set_plan(self.accelerator, self.layers)

    # ------------------------------------------------------------------------ saving
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = output_dir or self.args.output_dir
        gathered = self._gathered()
        if gathered is None:
            super().save_model(output_dir, _internal_call)
            parts = None
        else:
            rest, parts = self._split(gathered)
            self._save(folder, rest if not isinstance(self.model, PeftModel) else gathered)
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        if self.args.should_save:
            self.save_beside(Path(folder), parts or None)

    def _gathered(self) -> dict[str, Tensor] | None:
        """The weights to save, whole and on the CPU, on a rank that saves (elsewhere none of them);
        None: every rank holds them whole anyway. Every rank must call it."""
        if not self.is_fsdp_enabled and not is_deepspeed_zero3_enabled():
            return None
        if is_deepspeed_zero3_enabled():
            # What an evaluation has begun to fetch for a next forward pass would be in the way.
            self.model_wrapped.empty_partition_cache()
        own = {id(p) for p in self.method.parameters()} if self.method is not None else set()
        adapters = isinstance(self.model, PeftModel)  # whose frozen weights lie elsewhere

        def wanted(parameter: nn.Parameter) -> bool:
            return not adapters or parameter.requires_grad or id(parameter) in own

        return gather(self.model, wanted, self.args.should_save)

    def _split(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self.method is None:
            return dict(state), {}
        prefix = next(n for n, m in self.model.named_modules() if m is self.method)
        return split_parts(state, prefix)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Takes the pruner's weights, which have a file of their own, out of a whole model's."""
        if isinstance(self.model, PeftModel):  # picks what it saves itself
            super()._save(output_dir, state_dict)
            return
        if self.method is not None and self.args.should_save:
            state_dict = self._split(state_dict or self.model.state_dict())[0]
        folder = output_dir or self.args.output_dir
        if not is_deepspeed_zero3_enabled():
            super()._save(folder, state_dict)
        elif self.args.should_save and state_dict is not None:
            # A model that ZeRO-3 has loaded takes every renaming it might have needed for one it
            # needed, and would put prefixes twice; the names of its modules load as well.
            self.model.save_pretrained(
                output_dir or self.args.output_dir,
                state_dict=state_dict,
                save_original_format=False,
            )

    # ------------------------------------------------------------------------ loading
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled and not isinstance(self.model, PeftModel):
            load_whole(self.model, resume_from_checkpoint)
            return
        trains = [(p, p.requires_grad) for p in self.model.parameters()]
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for parameter, before in trains:  # PEFT unfreezes whatever an adapter's file holds
            parameter.requires_grad_(before)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()  # that includes the pruner
            return
        if isinstance(self.model, PeftModel):
            super()._load_best_model()
        else:
            load_whole(self.model, best)
        if self.method is not None:
            load_parts(self.method, Path(best))


def split_parts(
    state: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Divides a state dict into the model's weights and the pruner's, these by their own names.

    Args:
        state: all weights.
        prefix: name of the pruner in the model.
    """
    start = f"{prefix}."
    model = {name: value for name, value in state.items() if not name.startswith(start)}
    parts = {n.removeprefix(start): v for n, v in state.items() if n.startswith(start)}
    return model, parts


def gather(
    model: nn.Module, wanted: Callable[[nn.Parameter], bool], here: bool
) -> dict[str, Tensor]:
    """The whole weights of a model sharded by ZeRO-3 or FSDP2, on the CPU, under its own names.

    One weight at a time, so that no device has to hold them all. Every rank must call it.

    Args:
        model: what is sharded.
        wanted: which of its parameters.
        here: whether this rank is to hold them; an empty dict where it is not.
    """
    names = model.state_dict().keys()
    found: dict[int, Tensor] = {}
    gathered: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in names or not wanted(parameter):
            continue
        if id(parameter) not in found:  # tied weights stay one tensor
            with whole(parameter) as weight:
                found[id(parameter)] = (
                    weight.detach().cpu().clone() if here else weight.new_empty(0)
                )
        if here:
            gathered[name] = found[id(parameter)]
    if here:
        buffers = model.named_buffers(remove_duplicate=False)
        gathered |= {name: buffer.cpu() for name, buffer in buffers if name in names}
    return gathered


@contextmanager
def whole(parameter: nn.Parameter) -> Iterator[Tensor]:
    """A weight as if nobody had sharded it."""
    if isinstance(parameter, DTensor):
        yield parameter.full_tensor()
    elif "ds_id" in vars(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter
    else:
        yield parameter
