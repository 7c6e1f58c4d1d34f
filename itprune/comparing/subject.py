"""Subject: one loaded model that wears one pruner at a time.

Weights are loaded once. A checkpoint's own pruner is taken off; its method, when it is compared,
comes back with the options and trained parts the checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from itprune.answer import Answerer
from itprune.attach import Attached, attach, base_model
from itprune.calibration import Calibration
from itprune.checkpoint import Loaded
from itprune.comparing.entries import Case
from itprune.config import PruneConfig
from itprune.decoding import Decoding
from itprune.families import find_family
from itprune.prompt import PromptFormat


class Subject:
    """The model under comparison.

    Args:
        loaded: from `load_pretrained`; its pruner is detached.
    """

    def __init__(self, loaded: Loaded) -> None:
        attached, self.loaded = loaded.attached, Loaded(loaded.model, loaded.processor, None)
        self.own: PruneConfig | None = None
        self.trained: dict[str, Tensor] = {}
        self.prompt = PromptFormat.from_processor(loaded.processor)
        if attached is not None:
            self.own, self.prompt = attached.config, attached.prompt
            self.trained = {k: v.detach().clone() for k, v in attached.method.state_dict().items()}
            attached.detach()

    @property
    def model(self) -> Any:
        """The transformers model inside."""
        return base_model(self.loaded.model)

    def config(self, case: Case) -> PruneConfig:
        """The case's config; the checkpoint's own method starts from the checkpoint's options."""
        config = case.config()
        if self.own is None or config.method != self.own.method:
            return config
        options = {**self.own.options, **config.options}
        return config.replace(
            options=options,
            layout=self.own.layout,
            positions=config.positions or self.own.positions,
        )

    @contextmanager
    def wearing(self, case: Case, calibration: Calibration | None = None) -> Iterator[Attached]:
        """Attaches the case's pruner for the block.

        Raises:
            ValueError: the method does not fit this model or this budget, or needs training.
        """
        config = self.config(case)
        with attach(
            self.loaded.model, config, prompt=self.prompt, calibration=calibration
        ) as attached:
            self._give_weights(attached)
            yield attached

    def _give_weights(self, attached: Attached) -> None:
        method = attached.method
        if self.own is not None and attached.config.method == self.own.method:
            try:
                method.load_state_dict(self.trained)
            except RuntimeError:
                raise ValueError(
                    "the trained parts in this checkpoint have other shapes at this budget"
                ) from None
        elif method.card.training == "required":
            raise ValueError("needs training: tune a checkpoint with it, then compare on that one")
        method.to(next(self.model.parameters()).device)

    def answerer(self, attached: Attached | None, max_new_tokens: int) -> Answerer:
        """Asks greedily what the model, as it is dressed now, has to say."""
        loaded = Loaded(self.loaded.model, self.loaded.processor, attached)
        return Answerer(loaded, Decoding(max_new_tokens=max_new_tokens))

    @contextmanager
    def training(self, attached: Attached) -> Iterator[None]:
        """Only the projector and the method's own parts train, in training mode; undone after."""
        model, family = self.model, find_family(self.model)
        wanted = {p: p.requires_grad for p in model.parameters()}
        modes = {module: module.training for module in model.modules()}
        own = [p for p in attached.method.parameters() if p.requires_grad]
        model.requires_grad_(False)
        projectors = [p for module in family.projectors for p in module.parameters()]
        for parameter in (*projectors, *own):
            parameter.requires_grad_(True)
        model.train()
        family.tower.eval()
        try:
            with torch.enable_grad():
                yield
        finally:
            for parameter, want in wanted.items():
                parameter.requires_grad_(want)
                parameter.grad = None
            for module, mode in modes.items():
                module.training = mode
