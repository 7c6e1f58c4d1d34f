"""What answering cost, summed over the requests of a task, for lmms-eval's log and results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from itprune.answer import Answer


@dataclass
class Tally:
    """Sums over answers."""

    answers: int = 0
    seeing: int = 0
    """Answers to questions with pictures."""
    visual_in: int = 0
    visual_llm: int = 0
    visual_kept: float = 0.0
    """Visual tokens averaged over the layers of the language model."""
    tokens_out: int = 0
    seconds: float = 0.0
    failed: int = 0
    """Questions that could not be asked."""

    def add(self, batch: Sequence[Answer]) -> None:
        """Counts answers that were given together."""
        self.answers += len(batch)
        self.tokens_out += sum(answer.tokens_out for answer in batch)
        self.seconds += max(answer.total_s for answer in batch)
        for answer in batch:
            if answer.visual_layer_average is not None:
                self.seeing += 1
                self.visual_in += answer.visual_in
                self.visual_llm += answer.visual_stage1
                self.visual_kept += answer.visual_in * answer.visual_layer_average

    @property
    def speed(self) -> float:
        """Tokens answered in a second."""
        return self.tokens_out / self.seconds if self.seconds else 0.0

    def figures(self) -> dict[str, float]:
        """Means over questions with pictures; only counts where there are none."""
        counts = {"questions_answered": float(self.answers), "questions_failed": float(self.failed)}
        if not self.seeing:
            return counts
        return {
            "visual_tokens_in": self.visual_in / self.seeing,
            "visual_tokens_llm": self.visual_llm / self.seeing,
            "visual_tokens_layer_average": self.visual_kept / self.seeing,
            "visual_share_kept": self.visual_kept / self.visual_in,
            **counts,
        }
