"""Feed-forward blocks that run fewer channels for visual tokens (arXiv 2410.06169).

Text rows run through the module as it is. Visual rows run through the same module once more with
its weights cut to the first channels, so that any activation and any adapter in it stays what it
is, and the matrix products are really narrower. Where weights cannot be cut (quantised, sharded,
offloaded or fused ones, unknown adapters) all rows run at full width and the channels beyond are
set to zero before the last projection: the same numbers at full cost.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from itprune.engine.attention import KEYWORD, AttentionCall, Split
from itprune.families.base import FeedForward

_OUT = re.compile(r"(base_layer\.)?(weight|bias)|lora_B\.\w+\.(weight|bias)")
_OUT_WHOLE = re.compile(r"lora_A\.\w+\.(weight|bias)")
_IN = re.compile(r"(base_layer\.)?weight|lora_A\.\w+\.weight")
_IN_WHOLE = re.compile(r"(base_layer\.)?bias|lora_A\.\w+\.bias|lora_B\.\w+\.(weight|bias)")
"""Names of the parameters of a linear layer or of PEFT's LoRA around one: which of them have an
entry for each output (or input) channel, and which have not."""


class NarrowFeedForward:
    """Hooks on one layer's feed-forward block and on the attention before it.

    What the rows are travels with the attention's call, since that is what a recomputed layer
    (gradient checkpointing) repeats; hooks on the layer itself it may not.
    """

    def __init__(self, attention: nn.Module, block: FeedForward) -> None:
        self._block = block
        self._split: Split | None = None
        self._again = False
        self._rest: tuple[Split, Tensor, dict[str, Tensor]] | None = None
        self._mask: Tensor | None = None
        module, last = block.module, block.module.get_submodule(block.last)
        self.handles: list[RemovableHandle] = [
            attention.register_forward_pre_hook(self._before_attention, with_kwargs=True),
            module.register_forward_pre_hook(self._before),
            module.register_forward_hook(self._after),
            last.register_forward_pre_hook(self._before_last),
        ]

    def _before_attention(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        call: AttentionCall | None = kwargs.get(KEYWORD)
        self._split = None if call is None else call.split

    def _before(self, module: nn.Module, args: tuple[Tensor, ...]) -> Any:
        if self._again:
            return None
        self._rest = self._mask = None
        if self._split is None:
            return None
        hidden, split = args[0], self._split
        cut = _cut(self._block, split.share, hidden)
        if cut is None:
            mask = hidden.new_zeros(hidden.shape[:-1].numel(), dtype=torch.bool)
            mask[split.visual] = True
            self._mask = mask.view(hidden.shape[:-1])
            return None
        self._rest = (split, hidden, cut)
        return (hidden.flatten(0, 1)[split.text][None], *args[1:])

    def _after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if self._again:
            return None
        rest, self._rest, self._mask = self._rest, None, None
        if rest is None:
            return None
        split, hidden, cut = rest
        self._again = True
        try:
            narrow = functional_call(module, cut, (hidden.flatten(0, 1)[split.visual][None],))
        finally:
            self._again = False
        full = output.new_zeros(hidden.shape[:-1].numel(), output.shape[-1])
        index = torch.cat([split.text, split.visual])
        return full.index_copy(0, index, torch.cat([output[0], narrow[0]])).view(
            *hidden.shape[:-1], -1
        )

    def _before_last(self, module: nn.Module, args: tuple[Tensor, ...]) -> Any:
        if self._mask is None or self._split is None:
            return None
        hidden = args[0]
        channels = hidden.shape[-1]
        beyond = torch.arange(channels, device=hidden.device) >= _first(channels, self._split.share)
        return (hidden.masked_fill(self._mask[..., None] & beyond, 0.0), *args[1:])


def _first(channels: int, share: float) -> int:
    """How many channels `share` of them is."""
    return max(int(channels * share), 1)


def _cut(block: FeedForward, share: float, hidden: Tensor) -> dict[str, Tensor] | None:
    """The block's parameters with the first channels only; None: some cannot be cut."""
    if not block.first:
        return None
    out: dict[str, Tensor] = {}
    for name in (*block.first, block.last):
        linear = block.module.get_submodule(name)
        owners = [
            m for m in linear.modules() if next(m.parameters(recurse=False), None) is not None
        ]
        if any(type(module) is not nn.Linear for module in owners):
            return None
        dim, cut, whole = (1, _IN, _IN_WHOLE) if name == block.last else (0, _OUT, _OUT_WHOLE)
        for path, weight in linear.named_parameters():
            if type(weight) is not nn.Parameter or "ds_id" in vars(weight):  # sharded by ZeRO-3
                return None
            if weight.device != hidden.device or not (cut.fullmatch(path) or whole.fullmatch(path)):
                return None
            if cut.fullmatch(path):
                first = _first(weight.shape[dim], share)
                out[f"{name}.{path}"] = weight.narrow(dim, 0, first)
    return out
