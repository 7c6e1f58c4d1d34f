"""Judged answers agree with the model's own forward, alone and in batches, dense and pruned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from itprune import load_pretrained
from itprune.answer import Answerer
from itprune.decoding import Decoding
from itprune.lmms.likelihood import answer_ids, likelihoods
from itprune.question import Question

MODEL = Path(__file__).resolve().parents[2] / "assets" / "tiny-llava"
ANSWERS = ("red", "four", "red 4 or 5", "yes")
Answering = Callable[..., Answerer]


@pytest.fixture(scope="module")
def answering() -> Answering:
    """Answerers of the bundled model by keep and method, in double precision."""

    def make(**options: Any) -> Answerer:
        loaded = load_pretrained(MODEL, device="cpu", dtype=torch.float64, **options)
        return Answerer(loaded, Decoding(max_new_tokens=6))

    return make


def questions() -> list[Question]:
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 255, (2, 96, 96, 3), dtype=np.uint8)
    first, second = (Image.fromarray(one) for one in pixels)
    return [
        Question.from_prompt("What digit is red?", [first]),
        Question.from_prompt(
            "How many digits are there and which of them is the largest?", [second]
        ),
        Question.from_prompt("Is there a 4?", [second]),
        Question.from_prompt("A red 4 and a blue 5 are there. Is there a 4?"),
    ]


def forward_losses(answerer: Answerer, question: Question, ids: list[int]) -> torch.Tensor:
    """Negative log-likelihoods of the answer's tokens, of one forward over prompt and answer."""
    inputs = answerer.collate([answerer.encode(question)])
    told = torch.tensor([ids])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], told], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        logits = answerer.model(**inputs).logits[0, -len(ids) - 1 : -1]
    return -logits.log_softmax(-1).gather(1, told.T)[:, 0]


@pytest.mark.parametrize(
    "options", [{}, {"keep": 0.25, "method": "visionzip"}, {"keep": 0.25, "method": "divprune"}]
)
def test_losses_are_those_of_one_forward(answering: Answering, options: dict[str, Any]) -> None:
    answerer = answering(**options)
    asked = questions()
    ids = [answer_ids(answerer, q, a) for q, a in zip(asked, ANSWERS, strict=True)]
    assert len({len(one) for one in ids}) > 1
    found = likelihoods(answerer, [answerer.encode(q) for q in asked], ids)
    for one, question, told in zip(found, asked, ids, strict=True):
        expected = forward_losses(answerer, question, told).tolist()
        assert one.losses == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("method", ["visionzip", "fastv"])
def test_a_batch_judges_as_each_alone(answering: Answering, method: str) -> None:
    answerer = answering(keep=0.3, method=method)
    encoded = [answerer.encode(question) for question in questions()]
    ids = [answer_ids(answerer, q, a) for q, a in zip(questions(), ANSWERS, strict=True)]
    together = likelihoods(answerer, encoded, ids)
    for one, alone, told in zip(together, encoded, ids, strict=True):
        (expected,) = likelihoods(answerer, [alone], [told])
        assert one.losses == pytest.approx(expected.losses, abs=1e-5)
        assert one.greedy == expected.greedy


@pytest.mark.parametrize("method", ["visionzip", "fastv"])
def test_the_models_own_answer_is_the_greedy_one(answering: Answering, method: str) -> None:
    answerer = answering(keep=0.3, method=method)
    question = questions()[0]
    encoded = answerer.encode(question)
    (given,) = answerer.answer([encoded])
    own, other = (answer_ids(answerer, question, text) for text in (given.answer, "purple dog"))
    best, worse = likelihoods(answerer, [encoded, encoded], [own, other])
    assert best.greedy
    assert not worse.greedy
    assert best.loss < worse.loss


def test_what_comes_later_in_an_answer_does_not_change_its_beginning(answering: Answering) -> None:
    """It would, if the answer took part in choosing: fastv looks at the prompt's last token."""
    answerer = answering(keep=0.3, method="fastv")
    encoded = answerer.encode(questions()[0])
    first, last = (answer_ids(answerer, questions()[0], text) for text in ("red", "blue four"))
    (alone,) = likelihoods(answerer, [encoded], [first])
    (more,) = likelihoods(answerer, [encoded], [first + last])
    assert more.losses[: len(first)] == pytest.approx(alone.losses, abs=1e-6)
    assert more.loss != pytest.approx(alone.loss, abs=1e-3)


def test_an_empty_answer_is_refused(answering: Answering) -> None:
    with pytest.raises(ValueError, match="an answer to be judged is empty"):
        answer_ids(answering(), questions()[0], " ")


def test_an_answer_beyond_the_context_is_refused(answering: Answering) -> None:
    answerer = answering()
    encoded = answerer.encode(questions()[0])
    room = answerer.text_config.max_position_embeddings - encoded.length
    with pytest.raises(ValueError, match="model's context holds"):
        likelihoods(answerer, [encoded], [[5] * (room + 1)])
