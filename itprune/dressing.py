"""Wardrobe: changes the pruner of a loaded model, without loading its weights again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from itprune.attach import Attached, attach, check_budgets
from itprune.calibration import Calibration
from itprune.checkpoint import Loaded
from itprune.config import PruneConfig
from itprune.methods import methods
from itprune.methods.combined import SEPARATOR
from itprune.options import check_choice, check_fraction
from itprune.prompt import PromptFormat
from itprune.trained import is_trained

DENSE = 1.0


@dataclass(frozen=True)
class Dress:
    """A pruner that can be put on."""

    config: PruneConfig
    calibration: Calibration | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Of the method's trained parts."""

    @classmethod
    def of(cls, attached: Attached) -> Dress:
        """The pruner at work."""
        weights = {k: v.detach().clone() for k, v in attached.method.state_dict().items()}
        return cls(attached.config.replace(keep=attached.keep), attached.calibration, weights)


class Wardrobe:
    """Puts pruners on one model.

    Args:
        loaded: from `load_pretrained`; its `attached` is always the pruner at work.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        attached = loaded.attached
        self._own = None if attached is None else Dress.of(attached)
        self._budget = PruneConfig().final_keep if attached is None else attached.keep
        """What `keep` comes back with another method after `dense`."""

    def __str__(self) -> str:
        attached = self.loaded.attached
        if attached is None or attached.method.idle:
            return "dense"
        keep = attached.keep
        rule = "by its own rule" if keep is None else f"at keep {keep:g}"
        return f"{attached.config.method} {rule}"

    def keep(self, keep: float) -> None:
        """Changes the budget; a model without a pruner gets the default method.

        Raises:
            ValueError: no fraction in (0, 1], or out of the method's reach.
        """
        check_fraction("keep", keep)
        self._set(keep)
        self._budget = keep

    def dense(self) -> None:
        """Prunes nothing, until another budget or method is asked for."""
        if self.loaded.attached is not None:
            self._set(DENSE)

    def method(self, name: str, keep: float | None = None) -> None:
        """Changes the method; the checkpoint's own comes back with its options and trained parts.

        Args:
            name: of the method.
            keep: its budget; None: the one before.

        Raises:
            ValueError: unknown, it does not fit the model, or it has to be trained first.
        """
        for part in name.split(SEPARATOR):
            check_choice("method", part, methods())
        if keep is not None:
            check_fraction("keep", keep)
        budget = self._budget if keep is None else keep
        if self._own is not None and name == self._own.config.method:
            dress = replace(self._own, config=self._own.config.replace(keep=budget))
        else:
            dress = Dress(PruneConfig(name, keep=budget))
        self._change(dress)
        self._budget = budget

    def _set(self, keep: float) -> None:
        attached = self.loaded.attached
        if attached is None:
            self._change(Dress(PruneConfig(keep=keep)))
            return
        before = attached.keep
        try:
            check_budgets(attached.method, [keep])
        except ValueError:
            attached.set_keep(before)
            raise

    def _change(self, dress: Dress) -> None:
        """Another pruner; where it does not fit, the one before stays."""
        attached, before = self.loaded.attached, None
        prompt = PromptFormat.from_processor(self.loaded.processor)
        if attached is not None:
            before, prompt = Dress.of(attached), attached.prompt
            attached.detach()
            self.loaded.attached = None
        try:
            self._put_on(dress, prompt)
        except ValueError:
            if before is not None:
                self._put_on(before, prompt)
            raise

    def _put_on(self, dress: Dress, prompt: PromptFormat) -> None:
        config = dress.config
        attached = attach(self.loaded.model, config, prompt=prompt, calibration=dress.calibration)
        if is_trained(attached.method) and not dress.weights:
            attached.detach()
            raise ValueError(
                f"method {config.method!r} has trained parts and this checkpoint holds none for "
                "it; tune one with it (prune.method in the recipe)"
            )
        attached.method.load_state_dict(dress.weights)
        self.loaded.attached = attached
