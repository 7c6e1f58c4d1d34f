"""The model card of a run: written into its final folder, and the one that is pushed to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from itprune import Attached
from itprune.card import KeptShares, write_card


class KeptCallback(TrainerCallback):  # type: ignore[misc]
    """Notes how much of each sample stayed: in the last evaluation, else in the last steps.

    Read before the log that resets the counts, and only where it is needed.
    """

    def __init__(self, attached: Attached | None) -> None:
        self.attached = attached
        self.shares: KeptShares | None = None
        self._evaluated = False

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._evaluated = self._note("evaluation") or self._evaluated

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and not self._evaluated:
            self._note("the last ones of the training")

    def _note(self, where: str) -> bool:
        found = None
        if self.attached is not None:
            found = KeptShares.of(self.attached.totals.shares, where)
        self.shares = found or self.shares
        return found is not None


class CardTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose model card says how the model prunes.

    Args:
        attached: the pruner, if there is one.
        base: the model that is tuned, as the recipe names it.
    """

    def __init__(self, *args: Any, attached: Attached | None, base: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.base = base
        self.kept = KeptCallback(attached)
        self.add_callback(self.kept)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes README.md into the output folder; what the hub asks for is in it anyway."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            write_card(
                folder,
                name=(self.args.hub_model_id or folder.resolve().name).split("/")[-1],
                base=self.base,
                history=self.state.log_history,
                kept=self.kept.shares,
            )
