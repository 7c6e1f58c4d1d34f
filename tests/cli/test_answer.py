"""The Answerer: what it answers, and that the figures it gives are those of the real cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText, AutoProcessor

from itprune import load_pretrained
from itprune.answer import Answer, Answerer
from itprune.decoding import Clock, Decoding, RowSampler
from itprune.engine.cache import PrunedLayer
from itprune.question import ImageFolder, Question, open_image
from tests.tiny_llava import MARKED, PLAIN
from train.data.encode import Encoder
from train.data.images import ImageOpener
from train.data.llava import llava_sample

DRAW = Decoding(max_new_tokens=6)


@pytest.fixture(scope="module")
def asked(pictures: Path) -> list[Question]:
    """Different lengths; one image, two images, none."""
    images = [open_image(pictures / f"{i}.png") for i in range(4)]
    return [
        Question.from_prompt("What colour is the square?", images[:1]),
        Question.from_prompt("Which shape is on the left, <image> or <image> ?", images[1:3]),
        Question.from_prompt("0 1 2 3 4 5 6 7 8 9"),
        Question.from_prompt("red", images[3:]),
    ]


@pytest.fixture(scope="module")
def answerer(checkpoint: Path) -> Answerer:
    return Answerer(load_pretrained(checkpoint, device="cpu"), DRAW)


def timeless(answer: Answer) -> Answer:
    return replace(answer, prepare_s=0.0, first_token_s=0.0, total_s=0.0, batch=0)


def test_a_batch_is_its_questions(answerer: Answerer, asked: list[Question]) -> None:
    together = answerer(asked)
    alone = [answerer([question])[0] for question in asked]
    assert [a.batch for a in together] == [4] * 4
    for one, row in zip(alone, together, strict=True):
        assert timeless(one) == timeless(row)
    assert len({a.answer for a in together}) > 1


def test_keep_one_is_plain_transformers(checkpoint: Path, asked: list[Question]) -> None:
    answers = Answerer(load_pretrained(checkpoint, keep=1.0, device="cpu"), DRAW)(asked)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    for question, answer in zip(asked, answers, strict=True):
        text = processor.apply_chat_template(list(question.messages), add_generation_prompt=True)
        images = list(question.images) or None
        inputs = processor(text=text, images=images, add_special_tokens=False, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        assert answer.answer == processor.decode(new, skip_special_tokens=True).strip()
        assert answer.tokens_in == answer.tokens_stage1 == answer.tokens_stage2
        assert answer.tokens_in == inputs["input_ids"].shape[1]
        assert answer.visual_in == 16 * len(question.images)
        assert answer.kv_entries == 4 * answer.tokens_in
        assert answer.layer_average == 1.0


def test_figures_are_those_of_the_cache(answerer: Answerer, asked: list[Question]) -> None:
    encoded = [answerer.encode(question) for question in asked]
    reported = answerer.answer(encoded)
    settings = answerer.settings(1)
    out = answerer.model.generate(**answerer.collate(encoded), generation_config=settings)
    layers = out.past_key_values.layers
    assert all(isinstance(layer, PrunedLayer) for layer in layers)
    held = torch.stack([layer.entries() for layer in layers]).sum(0).tolist()
    assert [a.kv_entries for a in reported] == held
    for one in encoded:
        out = answerer.model.generate(**answerer.collate([one]), generation_config=settings)
        held = sum(t.nbytes for x in out.past_key_values.layers for t in (x.keys, x.values))
        assert answerer.answer([one])[0].kv_bytes == held


def test_figures_say_what_was_kept(answerer: Answerer, asked: list[Question]) -> None:
    picture, pair, text, _ = answerer(asked)
    assert picture.visual_in == 16
    assert pair.visual_in == 32
    for answer in (picture, pair):
        assert answer.visual_in > answer.visual_stage1 > answer.visual_stage2 > 0
        dropped = answer.visual_in - answer.visual_stage1
        assert answer.tokens_stage1 == answer.tokens_in - dropped
        # Stage 2 acts after layer 1 of 4, so two layers run on each set.
        tokens = 2 * answer.tokens_stage1 + 2 * answer.tokens_stage2
        visual = 2 * answer.visual_stage1 + 2 * answer.visual_stage2
        assert answer.kv_entries == tokens
        assert answer.layer_average == tokens / (4 * answer.tokens_in)
        assert answer.visual_layer_average == visual / (4 * answer.visual_in)
    assert text.visual_in == 0
    assert text.visual_layer_average is None
    assert text.kv_entries == 4 * text.tokens_in


def test_a_batch_without_images_after_one_with(answerer: Answerer, asked: list[Question]) -> None:
    """The figures of the last forward with images must not stick to it."""
    answerer(asked[:1])
    text = answerer(asked[2:3])[0]
    assert text.tokens_in == text.tokens_stage1 == text.tokens_stage2
    assert text.kv_entries == 4 * text.tokens_in


def test_an_answer_ends_at_its_end_token(checkpoint: Path, asked: list[Question]) -> None:
    loaded = load_pretrained(checkpoint, device="cpu")
    answerer = Answerer(loaded, DRAW)
    encoded = [answerer.encode(question) for question in asked]
    settings = answerer.settings(6)
    out = answerer.model.generate(**answerer.collate(encoded), generation_config=settings)
    width = answerer.collate(encoded)["input_ids"].shape[1]
    second = int(out.sequences[0, width + 1])
    loaded.model.generation_config.eos_token_id = [2, second]
    cut = Answerer(loaded, DRAW)(asked)[0]
    assert cut.finish == "stop"
    assert cut.tokens_out <= 2
    assert cut.first_token_s <= cut.total_s


def test_a_prompt_must_fit_the_context(checkpoint: Path, asked: list[Question]) -> None:
    loaded = load_pretrained(checkpoint, device="cpu")
    answerer = Answerer(loaded, DRAW)
    length = answerer.encode(asked[1]).length
    answerer.text_config.max_position_embeddings = length + 2
    assert [a.tokens_out for a in answerer(asked[:2])] == [6, 2]
    answerer.text_config.max_position_embeddings = length
    with pytest.raises(ValueError, match=f"prompt has {length} tokens .* holds {length}"):
        answerer.encode(asked[1])


def test_sampling_does_not_depend_on_the_batch(checkpoint: Path, asked: list[Question]) -> None:
    loaded = load_pretrained(checkpoint, device="cpu")
    hot = Answerer(loaded, Decoding(max_new_tokens=6, temperature=1.5, top_p=0.9, seed=3))
    together = [a.answer for a in hot(asked)]
    assert together == [hot([question])[0].answer for question in reversed(asked)][::-1]
    other = Answerer(loaded, Decoding(max_new_tokens=6, temperature=1.5, top_p=0.9, seed=4))
    assert together != [a.answer for a in other(asked)]
    assert together != [a.answer for a in Answerer(loaded, DRAW)(asked)]


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    rows = 4000
    sampler = RowSampler(Decoding(temperature=2.0), range(rows))
    drawn = sampler(torch.zeros(rows, 1), logits.expand(rows, -1)).argmax(1)
    share = torch.bincount(drawn, minlength=4) / rows
    assert (share - torch.softmax(logits / 2, 0)).abs().max() < 0.03
    nucleus = RowSampler(Decoding(temperature=1.0, top_p=0.5), range(rows))
    assert nucleus(torch.zeros(rows, 1), logits.expand(rows, -1)).argmax(1).unique().tolist() == [0]


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_the_coldest_temperatures_are_greedy(top_p: float) -> None:
    logits = torch.tensor([[1.0, 5.0, 9.0, -float("inf"), 8.99]])
    for temperature in (1e-9, 1e-38, 1e-45, 1e-300):
        sampler = RowSampler(Decoding(temperature=temperature, top_p=top_p), [0])
        assert sampler(torch.zeros(1, 1), logits).argmax(1).tolist() == [2]


def test_the_clock_stops_nothing() -> None:
    clock = Clock(torch.device("cpu"))
    for _ in range(3):
        assert not clock(torch.zeros(2, 5), torch.zeros(2, 7)).any()
    assert clock.ticks == sorted(clock.ticks)
    assert len(clock.ticks) == 3


@pytest.mark.parametrize("template", [MARKED, PLAIN])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_prompt_has_the_tokens_of_training(
    checkpoint: Path, pictures: Path, template: str, adds_bos: bool
) -> None:
    loaded = load_pretrained(checkpoint, device="cpu")
    tokenizer = loaded.processor.tokenizer
    loaded.processor.chat_template = template
    if adds_bos:  # as LLaVA-1.5's tokenizer does
        bos = (tokenizer.bos_token, tokenizer.bos_token_id)
        single = f"{bos[0]} $A"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single, None, [bos])
    record = {
        "image": "0.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat colour is the square?"},
            {"from": "gpt", "value": "red"},
            {"from": "human", "value": "And the circle?"},
            {"from": "gpt", "value": "The circle is blue."},
        ],
    }
    question = Question.from_record(record, ImageFolder(pictures))
    asked = Answerer(loaded).encode(question).inputs
    opener = ImageOpener(pictures, strict=False)
    trained = Encoder(loaded.processor, 512)(llava_sample(record), opener)
    prompt = asked["input_ids"]
    assert torch.equal(trained["input_ids"][: len(prompt)], prompt)
    assert torch.equal(trained["pixel_values"], asked["pixel_values"])
    assert int((prompt == tokenizer.bos_token_id).sum()) == (adds_bos or template == MARKED)


def test_too_little_memory_is_told(
    checkpoint: Path, asked: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer = Answerer(load_pretrained(checkpoint, device="cpu"), DRAW)

    def full(**kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(answerer.model, "generate", full)
    with pytest.raises(ValueError, match=r"does not hold 4 question\(s\).*smaller batch"):
        answerer(asked)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_decoding_is_checked(options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Decoding(**options)


def test_the_image_token_cannot_come_from_text(answerer: Answerer) -> None:
    content = [{"type": "text", "text": "a <image> that is none"}]
    with pytest.raises(ValueError, match="contains <image>"):
        answerer.encode(Question(({"role": "user", "content": content},)))
