"""Encoder and collator: what is supervised, how images and texts become a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image

from itprune.question import IMAGE
from tests.tiny_llava import MARKED, PLAIN, build_processor
from train.data.collate import BAD, PLACES, Collator
from train.data.encode import IGNORED, Encoder
from train.data.images import ImageOpener
from train.data.sample import BadSample, Sample, Turn

OPENER = ImageOpener(Path(), strict=True)
PICTURE = Image.new("RGB", (60, 60), "red")
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TEMPLATES = {"marked": MARKED, "unmarked": UNMARKED, "plain": PLAIN}


def sample(*turns: tuple[str, tuple[str, ...]]) -> Sample:
    made = tuple(Turn(role, parts) for role, parts in turns)
    return Sample(made, (PICTURE,) * sum(turn.images for turn in made))


ONE = sample(("user", (IMAGE, "What colour?")), ("assistant", ("It is red.",)))
MANY = sample(
    ("system", ("Be brief.",)),
    ("user", (IMAGE, "What colour?")),
    ("assistant", ("red",)),
    ("user", ("And this?", IMAGE, IMAGE)),
    ("assistant", ("blue, then green",)),
)
TEXT = sample(("user", ("What is 1?",)), ("assistant", ("A number.",)))


def encoder(template: str, max_length: int = 500) -> Encoder:
    return Encoder(build_processor(template), max_length)


def supervised(encode: Encoder, encoded: dict[str, Any]) -> list[str]:
    """The supervised stretches as text."""
    stretches: list[list[int]] = []
    before = IGNORED
    for label in encoded["labels"].tolist():
        if label != IGNORED:
            if before == IGNORED:
                stretches.append([])
            stretches[-1].append(label)
        before = label
    return [encode.tokenizer.decode(ids) for ids in stretches]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_every_answer_and_its_end_is_supervised_and_nothing_else(template: str) -> None:
    encode = encoder(template)
    for one, answers in [
        (ONE, ["It is red.</s>"]),
        (MANY, ["red</s>", "blue, then green</s>"]),
        (TEXT, ["A number.</s>"]),
    ]:
        encoded = encode(one, OPENER)
        assert [text.strip() for text in supervised(encode, encoded)] == answers
        known = encoded["labels"] != IGNORED
        assert torch.equal(encoded["labels"][known], encoded["input_ids"][known])


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="older versions misplace their own mask behind an image",
)
def test_labels_agree_with_the_templates_own_marks() -> None:
    encode = encoder(MARKED)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": PICTURE},
                                     {"type": "text", "text": "What colour?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is red."}]},
    ]  # fmt: skip
    stock = encode.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    encoded = encode(ONE, OPENER)
    assert encoded["input_ids"].tolist() == stock["input_ids"][0]
    assert (encoded["labels"] != IGNORED).int().tolist() == stock["assistant_masks"][0]


def test_image_tokens_and_pixels_match() -> None:
    encode = encoder(PLAIN)
    encoded = encode(MANY, OPENER)
    assert (encoded["input_ids"] == encode.processor.image_token_id).sum() == 3 * 16
    assert encoded["pixel_values"].shape == (3, 3, 56, 56)
    assert "pixel_values" not in encode(TEXT, OPENER)


def test_bos_is_written_once() -> None:
    for template in TEMPLATES.values():
        encode = encoder(template)
        ids = encode(TEXT, OPENER)["input_ids"].tolist()
        assert ids.count(encode.tokenizer.bos_token_id) == ids[0:1].count(
            encode.tokenizer.bos_token_id
        )


def test_long_texts_are_cut_and_images_never() -> None:
    whole = encoder(MARKED)(ONE, OPENER)
    length = len(whole["input_ids"])
    cut = encoder(MARKED, length - 1)(ONE, OPENER)
    assert torch.equal(cut["labels"], whole["labels"][:-1])
    first = int((whole["labels"] != IGNORED).int().argmax())
    with pytest.raises(BadSample, match="no supervised token"):
        encoder(MARKED, first)(ONE, OPENER)
    with pytest.raises(BadSample, match="images need more than"):
        encoder(MARKED, 10)(ONE, OPENER)


def test_an_image_token_in_the_text_is_refused() -> None:
    turns = (Turn("user", ("say <image>",)), Turn("assistant", ("no",)))
    with pytest.raises(BadSample, match="text itself contains <image>"):
        encoder(MARKED)(Sample(turns, ()), OPENER)


def test_processors_that_cannot_work_are_refused() -> None:
    processor = build_processor()
    processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Encoder(processor, 10)


@pytest.mark.parametrize("side", ["right", "left"])
def test_collator_pads_texts_and_joins_images(side: str) -> None:
    encode = encoder(MARKED)
    rows = [encode(one, OPENER) for one in (TEXT, MANY, ONE)]
    batch = Collator(pad_token_id=0, side=side)([{**row, BAD: []} for row in rows])
    longest = max(len(row["input_ids"]) for row in rows)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, longest)
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
    assert batch["pixel_values"].shape[0] == 4
    for i, row in enumerate(rows):
        inside = batch["attention_mask"][i].bool()
        assert torch.equal(batch["input_ids"][i][inside], row["input_ids"])
        assert torch.equal(batch["labels"][i][inside], row["labels"])
        assert (batch["labels"][i][~inside] == IGNORED).all()
        assert bool(inside[0]) == (side == "right" or i == 1)


def test_a_batch_of_texts_has_no_pixels() -> None:
    rows = [encoder(MARKED)(TEXT, OPENER)] * 2
    assert set(Collator(0)(rows)) == {BAD, PLACES, "input_ids", "attention_mask", "labels"}


def test_the_length_counts_what_enters_the_language_model() -> None:
    whole = encoder(MARKED)(ONE, OPENER)
    visual = int((whole["input_ids"] == encoder(MARKED).processor.image_token_id).sum())
    text = len(whole["input_ids"]) - visual
    entering = text + visual // 4
    fits = Encoder(build_processor(MARKED), entering, visual_share=0.25)(ONE, OPENER)
    assert torch.equal(fits["input_ids"], whole["input_ids"])
    cut = Encoder(build_processor(MARKED), entering - 2, visual_share=0.25)(ONE, OPENER)
    assert torch.equal(cut["input_ids"], whole["input_ids"][:-2])
    with pytest.raises(BadSample, match="no supervised token"):
        Encoder(build_processor(MARKED), entering - 2)(ONE, OPENER)
    with pytest.raises(BadSample, match=r"images need more than data.max_length = 4 tokens"):
        Encoder(build_processor(MARKED), 4, visual_share=0.25)(ONE, OPENER)


def test_the_models_positions_are_a_limit_of_their_own() -> None:
    whole = encoder(MARKED)(ONE, OPENER)
    length = len(whole["input_ids"])
    cut = Encoder(build_processor(MARKED), 500, 0.25, positions=length - 1)(ONE, OPENER)
    assert torch.equal(cut["labels"], whole["labels"][:-1])
    with pytest.raises(BadSample, match="than the 10 positions of the model"):
        Encoder(build_processor(MARKED), 500, 0.25, positions=10)(ONE, OPENER)
