"""The question beside the images: what a question-aware method may know before the LLM runs.

Only instruction tokens are used: template tokens are not the question, and answers must not leak
into what an image is reduced to.
Legend: B samples, S length, n images, W LLM width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from itprune.engine.sequence import Sequence

CACHED = 1024
"""Question states remembered at inference; they are small, and questions repeat."""


@dataclass
class QuestionReader:
    """Runs the LLM on questions alone."""

    text_model: nn.Module
    embed: nn.Module
    width: int
    states: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    weights: int = 0
    """Which weights `states` were read with."""

    @torch.no_grad()
    def read(self, questions: list[tuple[int, ...]]) -> Tensor:
        """(Q, W) state of each question's last token; zeros for an empty one."""
        asked = {ids for ids in questions if ids}
        if many_ranks():  # shared weights are gathered in step: every rank reads, each time
            states = self._run(sorted(asked or {(0,)}))
        elif self.text_model.training:  # weights change with every step
            states = self._run(sorted(asked))
        else:
            states = self._remembered(asked)
        blank = next(self.embed.parameters()).new_zeros(self.width)
        return torch.stack([states[ids] if ids else blank for ids in questions])

    def _remembered(self, asked: set[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
        weights = self._weights()
        if weights != self.weights or len(self.states) > CACHED:
            self.states.clear()
            self.weights = weights
        self.states.update(self._run(sorted(asked - self.states.keys())))
        return self.states

    def _weights(self) -> int:
        """Changes when weights are trained, loaded, moved, or adapters switched."""
        return hash(
            tuple(
                (w.data_ptr(), w.dtype, w.requires_grad, 0 if w.is_inference() else w._version)
                for w in self.text_model.parameters()
            )
        )

    def _run(self, questions: list[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
        if not questions:
            return {}
        device = next(self.embed.parameters()).device
        lens = torch.tensor([len(ids) for ids in questions], device=device)
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(ids, device=device) for ids in questions], batch_first=True
        )
        mask = torch.arange(ids.shape[1], device=device) < lens[:, None]
        out = self.text_model(
            inputs_embeds=self.embed(ids), attention_mask=mask.long(), use_cache=False
        )
        last = out.last_hidden_state[torch.arange(len(ids), device=device), lens - 1]
        return dict(zip(questions, last, strict=True))


@dataclass(frozen=True)
class Question:
    """The questions of one batch, beside its images or its videos."""

    ids: Tensor
    """(B, S) input ids."""
    sequence: Sequence
    visual: Tensor
    """(B, S) bool: the placeholders of the images, or of the videos."""
    reader: QuestionReader

    def protected(self, slots: int) -> Tensor:
        """(slots,) slots that must stay; none for a blank image beside a batch of text."""
        protected = self.sequence.protected[self.visual]
        return protected if self._holds(slots) else protected.new_zeros(slots)

    def sample_of(self, first: Tensor, slots: int) -> Tensor:
        """The batch row of each image; zeros for a blank image beside a batch of text.

        Args:
            first: (n,) first slot of each image.
            slots: of all images.
        """
        return self.visual.nonzero()[:, 0][first] if self._holds(slots) else torch.zeros_like(first)

    def _holds(self, slots: int) -> bool:
        """Whether the batch has a placeholder for each slot, or else none at all.

        Raises:
            ValueError: neither.
        """
        count = int(self.visual.sum())
        if count not in (0, slots):
            raise ValueError(
                f"the prompt has {count} image tokens, but its images make {slots}: image features "
                "and image tokens do not match; let one call of the processor make both"
            )
        return count > 0

    @property
    def _asked(self) -> Tensor:
        """(B, S) tokens of the question itself."""
        return self.sequence.instruction & ~self.sequence.protected

    def states(self, sample: Tensor) -> Tensor:
        """(n,) rows -> (n, W)."""
        rows = sample.tolist()
        asked = {row: tuple(self.ids[row][self._asked[row]].tolist()) for row in set(rows)}
        return self.reader.read([asked[row] for row in rows])

    @torch.no_grad()
    def embeddings(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) rows -> (M, W) embeddings of the question tokens of each image, (M,) whose image."""
        asked = self._asked[sample]
        image = asked.nonzero()[:, 0]
        return self.reader.embed(self.ids[sample][asked]), image

    def every(self, step: int) -> Question:
        """The questions of every `step`-th row: beams of a sample share theirs."""
        sequence = self.sequence.every(step)
        return Question(self.ids[::step], sequence, self.visual[::step], self.reader)


def many_ranks() -> bool:
    """Whether several processes train one model."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
