"""Prefill and training step of many cases in one interleaved run.

Prefill is the forward over the prompts that fills the cache, tower and projector included. A
training step is forward and backward on the same samples with their answers as labels; only the
projector and the method's own parts have gradients, the LLM is passed through. There is no
optimizer, no adapter and no checkpointing in it: it shows what fewer tokens save, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from itprune.answer import Answerer, Encoded
from itprune.attach import Attached
from itprune.bench.timing import Clock, interleave, median, use_threads
from itprune.calibration import Calibration
from itprune.comparing.answering import Encodings
from itprune.comparing.data import Sample
from itprune.comparing.entries import Case
from itprune.comparing.subject import Subject
from itprune.inputs import PER_TOKEN

Progress = Callable[[str], None]


@dataclass
class Item:
    """A case to time, and its laps in seconds."""

    case: Case
    calibration: Calibration | None
    prefill: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    failed: str = ""
    """Why it could not be timed."""

    @property
    def figures(self) -> dict[str, Any]:
        """Medians in milliseconds, or why there are none."""
        if self.failed:
            return {"failed": self.failed}
        return {
            "prefill_ms": 1e3 * median(self.prefill),
            "step_ms": 1e3 * median(self.step),
        }


class Stopwatch:
    """The batch everything is timed on.

    Args:
        subject: the model.
        samples: those of the batch, with pictures.
        encode: makes tensors of them.
        threads: CPU threads.
    """

    def __init__(
        self, subject: Subject, samples: Sequence[Sample], encode: Encodings, threads: int
    ) -> None:
        self.subject, self.threads = subject, threads
        answerer = subject.answerer(None, 1)
        prompts = [encode(answerer, sample) for sample in samples]
        self.prompts = answerer.collate(prompts)
        taught = [_with_answer(answerer, p, s) for p, s in zip(prompts, samples, strict=True)]
        self.taught = answerer.collate(taught)
        self.taught["labels"] = _labels(self.taught, taught, prompts)
        self.clock = Clock(subject.model.device, threads)

    def run(self, items: Sequence[Item], rounds: int, progress: Progress) -> None:
        """Times every item once a round, after a round that only warms up.

        Raises:
            MemoryError: the device's does not suffice.
        """
        with use_threads(self.threads):
            for item in items:
                self._warm_up(item)
            items = [item for item in items if not item.failed]
            for number, item in enumerate(interleave(items, rounds)):
                if number % len(items) == 0:
                    progress(f"timing, round {number // len(items) + 1} of {rounds}")
                self._lap(item)

    def _warm_up(self, item: Item) -> None:
        try:
            self._lap(item)
        except ValueError as error:
            item.failed = str(error)
        item.prefill.clear()
        item.step.clear()

    def _lap(self, item: Item) -> None:
        try:
            with self.subject.wearing(item.case, item.calibration) as attached:
                item.prefill.append(self._prefill())
                item.step.append(self._step(attached))
        except torch.OutOfMemoryError:
            raise MemoryError(
                "the device's memory does not hold a training step of this batch; "
                "use a smaller --batch-size, or --rounds 0 to time nothing"
            ) from None

    @torch.no_grad()
    def _prefill(self) -> float:
        self.clock.restart()
        self.subject.model(**self.prompts, use_cache=True, logits_to_keep=1)
        return self.clock.lap()

    def _step(self, attached: Attached) -> float:
        with self.subject.training(attached):
            self.clock.restart()
            self.subject.model(**self.taught).loss.backward()
            return self.clock.lap()


def _with_answer(answerer: Answerer, prompt: Encoded, sample: Sample) -> Encoded:
    """The prompt with its answer and the token that ends it behind."""
    text = sample.answers[0] + (answerer.processor.tokenizer.eos_token or "")
    said = torch.tensor(answerer.processor.tokenizer.encode(text, add_special_tokens=False))
    inputs: dict[str, Tensor] = dict(prompt.inputs)
    for name, value in prompt.inputs.items():
        if name == "input_ids":
            inputs[name] = torch.cat([value, said])
        elif name in PER_TOKEN:  # without a template, types tell the answer from the prompt
            filled = int(name == "attention_mask" or answerer.plain)
            inputs[name] = F.pad(value, (0, len(said)), value=filled)
    return Encoded(inputs, prompt.prepare_s)


def _labels(
    batch: Mapping[str, Tensor], taught: Sequence[Encoded], prompts: Sequence[Encoded]
) -> Tensor:
    """(B, S): the answers' tokens, -100 elsewhere; rows are padded on the left."""
    labels = torch.full_like(batch["input_ids"], -100)
    for row, (whole, prompt) in enumerate(zip(taught, prompts, strict=True)):
        said = whole.length - prompt.length
        labels[row, -said:] = batch["input_ids"][row, -said:]
    return labels
