"""What methods share whose trained weights fix how many tokens come out.

Such a size is chosen once, when the first target arrives, and then holds: a schedule cannot move
it, and a checkpoint runs at the size it was trained with, or dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from itprune.methods.base import Method


class FixedSize(Method):
    """A method with one size. Subclasses set `size` when built, for no target."""

    size_option: ClassVar[str]
    """The option that names the size."""
    size: int
    _settled = False

    def size_for(self, keep: float | None) -> int:
        """The size a target asks for; the option, where it is set.

        Raises:
            ValueError: the model has no such size.
        """
        raise NotImplementedError

    def resize(self, size: int) -> None:
        """Makes the weights that depend on the size anew."""
        raise NotImplementedError

    def stored_size(self, state: Mapping[str, Tensor], prefix: str) -> int | None:
        """The size of a checkpoint's weights; None where they are missing."""
        raise NotImplementedError

    def share(self, keep: float | None) -> None:
        if keep != 1.0 and not (keep is None and self._settled):
            self._settle(self.size_for(keep), keep)
        self._settled = True  # from now on an optimizer may hold the weights
        super().share(keep)

    def _settle(self, size: int, keep: float | None) -> None:
        if size == self.size:
            return
        if self._settled:
            raise ValueError(
                f"prune.keep: {keep} asks for {self.size_option} {size}, but the weights are for "
                f"{self.size_option} {self.size}; keep one fraction instead of several, or name "
                f"prune.{self.size_option}"
            )
        self.resize(size)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        held = {  # ZeRO-3 hands over empty tensors, and fills the weights by itself
            name: value
            for name, value in state_dict.items()
            if isinstance(value, Tensor) and value.numel()
        }
        stored = self.stored_size(held, prefix)
        if stored is not None and stored != self.size:
            if self._settled and self.keep != 1.0:
                raise ValueError(
                    f"prune.{self.size_option}: the checkpoint was trained with {stored}, and "
                    f"here it is {self.size}; run it with prune.{self.size_option}: {stored}"
                )
            self.resize(stored)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
