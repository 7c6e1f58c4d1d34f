"""Judged answers in every family: positions, masks and templates are those of the model itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from itprune import PruneConfig
from itprune.answer import Answerer
from itprune.inputs import PER_TOKEN
from itprune.lmms.likelihood import answer_ids, likelihoods
from itprune.question import Question
from tests import chat_models

ANSWERS = ("green blue", "yellow")
KEPT = PruneConfig("uniform", keep=0.5)


def asked() -> list[Question]:
    pictures = [chat_models.picture(seed) for seed in (0, 1)]
    return [
        Question.from_prompt("What colour?", pictures[:1]),
        Question.from_prompt("Which shape is on the left? The circle.", pictures[1:]),
    ]


def forward_losses(answerer: Answerer, question: Question, ids: list[int]) -> list[float]:
    """Of one forward over prompt and answer."""
    inputs: dict[str, Any] = answerer.collate([answerer.encode(question)])
    told = torch.tensor([ids])
    fill = {"input_ids": told, "attention_mask": torch.ones_like(told)}
    for key in inputs.keys() & PER_TOKEN.keys():
        more = fill.get(key, torch.zeros_like(told))
        inputs[key] = torch.cat([inputs[key], more], 1)
    with torch.no_grad():
        logits = answerer.model(**inputs).logits[0, -len(ids) - 1 : -1]
    return (-logits.log_softmax(-1).gather(1, told.T)[:, 0]).tolist()


@pytest.mark.parametrize("config", [None, KEPT], ids=["dense", "pruned"])
@pytest.mark.parametrize("name", chat_models.NAMES)
def test_losses_are_those_of_one_forward(name: str, config: PruneConfig | None) -> None:
    answerer = Answerer(chat_models.load(name, config))
    ids = [answer_ids(answerer, q, a) for q, a in zip(asked(), ANSWERS, strict=True)]
    for told, answer in zip(ids, ANSWERS, strict=True):
        assert answerer.processor.tokenizer.decode(told).split() == answer.split()
    found = likelihoods(answerer, [answerer.encode(q) for q in asked()], ids)
    for one, question, told in zip(found, asked(), ids, strict=True):
        assert one.losses == pytest.approx(forward_losses(answerer, question, told), abs=1e-4)


def test_a_model_without_a_template() -> None:
    answerer = Answerer(chat_models.load("paligemma", None))
    question = Question.from_prompt("What colour?", [chat_models.picture(0)])
    ids = answer_ids(answerer, question, "green blue")
    assert answerer.processor.tokenizer.decode(ids).split() == ["green", "blue"]
    (found,) = likelihoods(answerer, [answerer.encode(question)], [ids])
    assert len(found.losses) == len(ids)
    assert found.loss > 0
