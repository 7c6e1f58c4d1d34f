"""What only the outermost call knows: the tokens, the labels, whether there are images.

Also label-only logits: in training the head runs at supervised positions alone, which is what
turns dropped tokens into time once hidden states are scattered back to full length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from itprune.engine.sequence import Sequence
from itprune.prompt import PromptFormat

IGNORE = -100
PIXELS = ("pixel_values", "pixel_values_videos")
OWN_HEAD = "fused_lm_head"
"""Called with it, TRL's forward takes the head's weights and supervised positions itself, out of
hidden states at all positions."""


@dataclass
class Request:
    """One call of the whole model."""

    ids: Tensor | None
    """(B, S) input ids."""
    targets: Tensor | None
    """(B, S) what each position should predict, -100 where nothing."""
    padding_mask: Tensor | None
    """(B, past + S) 2-D attention mask."""
    has_images: bool
    encoded: dict[str, Any] = field(default_factory=dict)
    """image, video -> encoder output made before this call; it may still wait for the question."""
    guesses: int = 0
    """Tokens assisted decoding appends to be verified: their logits are needed."""
    learns: bool = False
    """The model is in training mode."""
    head_mask: Tensor | None = None
    """(B, S) positions the head computes; None: as the host says."""

    @classmethod
    def read(cls, kwargs: dict[str, Any], learns: bool = False) -> Request:
        """Reads the call's arguments, by name."""
        ids, labels, targets = (kwargs.get(k) for k in ("input_ids", "labels", "shift_labels"))
        if targets is None and labels is not None:
            targets = F.pad(labels, (0, 1), value=IGNORE)[..., 1:]
        mask = kwargs.get("attention_mask")
        given = kwargs.get("mm_encoder_outputs") or {}
        encoded = {kind: output for kind, output in given.items() if output is not None}
        wanted = kwargs.get("logits_to_keep", 0)
        pixels = any(kwargs.get(name) is not None for name in PIXELS)
        return cls(
            ids=ids,
            targets=targets,
            padding_mask=mask if isinstance(mask, Tensor) and mask.ndim == 2 else None,
            guesses=max(wanted - 1, 0) if isinstance(wanted, int) else 0,
            # Placeholder ids alone are not enough: a model may generate them while decoding.
            encoded=encoded,
            has_images=pixels or bool(encoded),
            learns=learns,
        )

    def check_prunable(self) -> None:
        """Raises ValueError: a call that shows less than what a choice is made from."""
        if self.ids is None:
            raise ValueError("token pruning needs input_ids beside the pixels, not inputs_embeds")
        # What chunked prefill cuts out of the encoder's output keeps the features alone.
        if any(output.get("last_hidden_state") is None for output in self.encoded.values()):
            raise ValueError(
                "a prompt with images must be read at once, since its question may stand behind "
                "them; leave prefill_chunk_size unset, or hand over mm_encoder_outputs as the "
                "encoder made them"
            )

    def check_embedded(self, embeds: Tensor) -> None:
        """Raises ValueError: slots a method left empty, (B, S, W), among which it cannot be told
        where images stand: they would be attended to."""
        shape = (embeds.shape[0], embeds.shape[1])
        empty = (embeds == 0).all(-1) & self.padding(shape, embeds.device).valid
        if bool(empty.any()):
            raise ValueError(
                "inputs_embeds hold pruned image features, whose empty slots must not be seen; "
                "pass input_ids and pixel_values, or get the features before `attach`"
            )

    def without_placeholders(
        self, kwargs: dict[str, Any], visual_ids: tuple[int, ...]
    ) -> dict[str, Any]:
        """Ignores labels that are placeholders of visual tokens: trainers which supervise a whole
        text leave them there, and a position that is to predict one could not be dropped."""
        named = [name for name in ("labels", "shift_labels") if kwargs.get(name) is not None]
        if not named or self.targets is None:
            return kwargs
        ids = torch.tensor(visual_ids, device=self.targets.device)
        self.targets = self.targets.masked_fill(torch.isin(self.targets, ids), IGNORE)
        ignored = {
            name: kwargs[name].masked_fill(torch.isin(kwargs[name], ids), IGNORE) for name in named
        }
        return {**kwargs, **ignored}

    def label_only(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Asks for logits at supervised positions only; (M, vocab) in row-major order."""
        if kwargs.get(OWN_HEAD):
            return kwargs
        wanted = kwargs.get("logits_to_keep", 0)
        if kwargs.get("labels") is None or self.targets is None or not isinstance(wanted, int):
            return kwargs
        mask = self.targets != IGNORE
        if wanted != 0 or not bool(mask.any()):
            return kwargs
        self.head_mask = mask
        return {**kwargs, "shift_labels": self.targets[mask]}

    def sequence(
        self,
        shape: tuple[int, int],
        device: torch.device,
        visual_ids: tuple[int, ...],
        prompt: PromptFormat,
    ) -> Sequence:
        """The facts about each of the (B, S) positions."""
        samples, length = shape
        plain = self.padding(shape, device)
        if self.ids is None or self.ids.shape[1] < length:
            return plain
        valid, blank, mask = plain.valid, plain.visual, self.padding_mask
        place = torch.arange(length, device=device).expand(samples, -1)
        ids = self.ids[:, -length:]
        visual = torch.isin(ids, torch.tensor(visual_ids, device=device)) & valid
        supervised = blank if self.targets is None else self.targets != IGNORE
        supervised = supervised | F.pad(supervised, (1, 0))[:, :-1]  # labels and their predictors
        last = (valid * (place + 1)).argmax(1)
        if self.learns and self.targets is None and not prompt.assistant_prefix:
            supervised = ~visual  # a loss of the caller's own, on text we know nothing about
        protected = prompt.protected(ids) & ~visual | supervised
        protected = protected | (place >= last[:, None] - self.guesses)
        end = self._first_answer(ids, prompt, last - self.guesses)
        instruction = valid & ~visual & (place < end[:, None])
        asks = _asks(visual, instruction, end)
        final = (instruction * (place + 1)).argmax(1)
        at_end = (place == final[:, None]) & instruction
        return Sequence(valid, visual, protected, instruction, asks, at_end, mask)

    def padding(self, shape: tuple[int, int], device: torch.device) -> Sequence:
        """Which of the (B, S) positions are real, and nothing else about them."""
        blank = torch.zeros(shape, dtype=torch.bool, device=device)
        mask = self.padding_mask
        valid = ~blank if mask is None else mask[:, -shape[1] :].bool().to(device)
        return Sequence(valid, blank, blank, blank, blank, blank, mask)

    def _first_answer(self, ids: Tensor, prompt: PromptFormat, last: Tensor) -> Tensor:
        """(B,) where the first assistant turn begins: by template, by labels, or the end."""
        answer = prompt.first_answer(ids)
        end = torch.minimum(answer, last + 1)
        if self.targets is None:
            return end
        predicts = self.targets != IGNORE
        first = torch.where(predicts.any(1), predicts.int().argmax(1) + 1, last + 1)
        return torch.where(answer < ids.shape[1], end, torch.minimum(end, first))


def _asks(visual: Tensor, instruction: Tensor, end: Tensor) -> Tensor:
    """Instruction tokens after the first visual token; the last prompt token when there is none."""
    seen = visual.int().cumsum(1) > 0
    asks = instruction & seen
    none = ~asks.any(1)
    fallback = torch.zeros_like(asks).scatter(1, (end - 1).clamp(min=0)[:, None], True)
    return asks | (fallback & none[:, None])


def check_one_sample(position_ids: Tensor | None) -> None:
    """The host reads (B, S) position ids, the first axis of (4, B, S), that do not count on by one
    as several samples in a row, and keeps them apart.

    Raises:
        ValueError: a row has several samples.
    """
    if position_ids is None or (position_ids.ndim == 3 and len(position_ids) != 4):
        return
    ids = position_ids[0] if position_ids.ndim == 3 else position_ids
    if bool((ids.diff(dim=-1) != 1).any()):
        raise ValueError(
            "position_ids: several samples packed into one row cannot be pruned, since each has a "
            "question of its own; give every sample its row and pass attention_mask (rows of "
            "different lengths cost nothing: layers run on packed tokens anyway)"
        )
