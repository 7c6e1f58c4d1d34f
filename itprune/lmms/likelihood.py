"""How likely a checkpoint finds given answers, on the tokens its pruner keeps.

The given answer is forced on the model's own `generate`, one token after the other, and the logits
of each step say what the model thought of it. So tokens are chosen from the prompt alone, as when
the model answers itself; an answer that stood in the prompt would take part in its own pruning.

Shapes: B questions of a batch, V tokens of the vocabulary.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from itprune.answer import Answerer, Encoded
from itprune.question import Question


@dataclass(frozen=True)
class Likelihood:
    """What a model thinks of a given answer."""

    losses: tuple[float, ...]
    """Negative log-likelihood of each of its tokens."""
    greedy: bool
    """The model would have given it."""

    @property
    def loss(self) -> float:
        """Mean over its tokens."""
        return statistics.fmean(self.losses)


def likelihoods(
    answerer: Answerer, batch: Sequence[Encoded], answers: Sequence[Sequence[int]]
) -> list[Likelihood]:
    """Judges one given answer for each question.

    Args:
        answerer: the model.
        batch: B encoded questions.
        answers: B answers as token ids, from `answer_ids`.

    Raises:
        ValueError: a prompt with its answer does not fit the model's context.
    """
    for encoded, ids in zip(batch, answers, strict=True):
        _check_room(answerer, encoded.length + len(ids))
    longest = max(map(len, answers))
    generate: Any = answerer.model.generate
    with torch.no_grad():
        out = generate(
            **answerer.collate(batch),
            generation_config=GenerationConfig(
                max_new_tokens=longest,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                eos_token_id=list(answerer.stops),
                pad_token_id=answerer.stops[0],
                return_dict_in_generate=True,
                output_logits=True,  # before the penalties a checkpoint may ask `generate` for
            ),
            logits_processor=LogitsProcessorList([Forced(answers)]),
        )
    return [_judge(out.logits, row, ids) for row, ids in enumerate(answers)]


def _judge(steps: Sequence[Tensor], row: int, ids: Sequence[int]) -> Likelihood:
    """One row's answer under the scores (B, V) of every step."""
    scores = torch.stack([step[row] for step in steps[: len(ids)]]).float().cpu()
    told = torch.tensor(ids)
    losses = -scores.log_softmax(-1).gather(1, told[:, None])[:, 0]
    return Likelihood(tuple(losses.tolist()), bool((scores.argmax(-1) == told).all()))


def answer_ids(answerer: Answerer, question: Question, answer: str) -> list[int]:
    """Tokens of an answer as they stand behind this question, without what ends a turn.

    Raises:
        ValueError: the answer is empty.
    """
    answer = answer.strip()
    tokenizer = answerer.processor.tokenizer
    before = "" if answerer.plain else _render(answerer, question.messages, prompt=True)
    text = before + answer
    if not answerer.plain:
        turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        whole = _render(answerer, (*question.messages, turn), prompt=False)
        if whole.startswith(before) and answer in whole[len(before) :]:
            text = whole[: whole.index(answer, len(before)) + len(answer)]
    known = tokenizer.encode(before, add_special_tokens=False)
    ids = tokenizer.encode(text, add_special_tokens=False)[len(known) :]
    if not ids:
        raise ValueError("an answer to be judged is empty")
    return ids


def _render(answerer: Answerer, messages: Sequence[dict[str, Any]], prompt: bool) -> str:
    return answerer.processor.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=prompt
    )


def _check_room(answerer: Answerer, length: int) -> None:
    most = answerer.text_config.max_position_embeddings
    if length > most:
        raise ValueError(
            f"a prompt has {length} tokens with its images and the answer to be judged, but the "
            f"model's context holds {most}; use a task with shorter prompts or fewer images"
        )


class Forced(LogitsProcessor):
    """Makes `generate` give the answers it is told.

    Args:
        answers: B answers as token ids; none is empty.
    """

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        # A row that is done repeats its last token, which nobody looks at.
        longest = max(map(len, answers))
        told = [[ids[min(i, len(ids) - 1)] for ids in answers] for i in range(longest)]
        self._told = iter(told)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Takes scores (B, V); returns them with all but the told tokens ruled out."""
        told = torch.tensor(next(self._told), device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, told, 0.0)
