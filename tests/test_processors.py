"""Real processors of every family: saved, loaded, asked in batches, dense and pruned."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from itprune import PromptFormat, PruneConfig, attach, load_pretrained, save_pretrained
from itprune.answer import Answerer
from itprune.checkpoint import Loaded
from itprune.cli import main
from itprune.decoding import Decoding
from itprune.inputs import join, load_processor, placeholder_ids
from itprune.question import Question
from tests.family_models import build
from tests.tiny_folders import MAKERS, QWEN_TOKENS, build_folder
from tests.tiny_llava import build_folder as build_llava
from tests.tiny_templates import tokenizer

SHORT = Decoding(max_new_tokens=6)
FAMILIES = ("llava", *MAKERS)


def picture(width: int, height: int, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed)
    return Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8))


WIDE, TALL, SMALL = picture(200, 70, 0), picture(60, 190, 1), picture(64, 64, 2)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    return build_llava(path) if request.param == "llava" else build_folder(request.param, path)


def answerer(folder: Path, **options: Any) -> Answerer:
    return Answerer(load_pretrained(folder, device="cpu", **options), SHORT)


def questions(asked: Answerer) -> list[Question]:
    """Two images of unlike sizes in one row, one image, another size, and text alone."""
    rows = [
        Question.from_prompt("Is <image> left of <image> ?", [WIDE, TALL]),
        Question.from_prompt("What colour?", [SMALL]),
        Question.from_prompt("Which shape is on the left? The circle.", [TALL]),
    ]
    return rows if asked.plain else [*rows, Question.from_prompt("green blue yellow")]


def said(answers: list[Any]) -> list[tuple[Any, ...]]:
    return [(a.answer, a.tokens_out, a.tokens_in, a.visual_in, a.visual_stage1) for a in answers]


# -------------------------------------------------------------------------------------- answers
@pytest.mark.parametrize(
    "options",
    [{}, {"keep": 0.5, "method": "topk_cls"}, {"keep": 0.5, "method": "itprune"}],
    ids=["dense", "topk_cls", "itprune"],
)
def test_a_batch_is_answered_like_its_questions(folder: Path, options: dict[str, Any]) -> None:
    asked = answerer(folder, **options)
    rows = questions(asked)
    together = asked(rows)
    assert said(together) == [said(asked([row]))[0] for row in rows]
    assert len({a.answer for a in together}) > 1
    images = [len(row.images) for row in rows]
    assert [bool(a.visual_in) for a in together] == [bool(count) for count in images]
    for answer in together:
        if not options or not answer.visual_in:
            assert answer.tokens_stage2 == answer.tokens_in
        else:
            assert answer.visual_stage2 < answer.visual_in


def test_what_is_saved_answers_the_same(folder: Path, tmp_path: Path) -> None:
    asked = answerer(folder, keep=0.4, method="fastv", options={"layer": 1, "fraction": 0.4})
    save_pretrained(tmp_path, asked.loaded.model, asked.processor, asked.loaded.attached)
    again = answerer(tmp_path)
    assert again.loaded.attached is not None
    assert said(again(questions(again))) == said(asked(questions(asked)))


def test_images_and_placeholders_agree(folder: Path) -> None:
    """A dense forward with labels, of a batch whose rows hold no, one and two images."""
    asked = answerer(folder)
    batch = asked.collate([asked.encode(question) for question in questions(asked)])
    with torch.no_grad():
        loss = asked.model(**batch, labels=batch["input_ids"]).loss
    assert torch.isfinite(loss)
    assert set(asked.visual_ids.tolist()) & set(placeholder_ids(asked.processor))


def test_text_that_looks_like_an_image_is_refused(folder: Path) -> None:
    asked = answerer(folder)
    for token in asked.reserved:
        if token != "<image>":  # which a question takes for the place of an image
            with pytest.raises(ValueError, match="a token of the model's images"):
                asked.encode(Question.from_prompt(f"What is {token}?", [SMALL]))


# -------------------------------------------------------------------------------------- prompts
def turns(*texts: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [
        {"role": roles[i % 2], "content": [{"type": "text", "text": text}]}
        for i, text in enumerate(texts)
    ]


def test_the_first_answer_is_found_in_every_template(folder: Path) -> None:
    processor = load_processor(folder)
    prompt, words = PromptFormat.from_processor(processor), processor.tokenizer
    if not processor.chat_template:
        assert set(prompt.protected_ids) == set(words.all_special_ids)
        assert prompt.assistant_prefix == ()
        return
    for question in ("What digit is red?", "Is there a 7"):
        whole = processor.apply_chat_template(turns(question, "blue", "And?", "red"))
        asked = processor.apply_chat_template(turns(question), add_generation_prompt=True)
        ids = words.encode(whole, add_special_tokens=False)
        start = int(prompt.first_answer(torch.tensor([ids]))[0])
        assert start == len(words.encode(asked, add_special_tokens=False))
        assert words.decode(ids[start:]).strip().startswith("blue")


def test_turns_a_template_refuses_are_one_sentence(tmp_path: Path) -> None:
    asked = answerer(build_folder("gemma3", tmp_path))
    twice = [*turns("What is it?"), *turns("What colour?")]
    with pytest.raises(ValueError, match=r"template refuses these turns.*alternate"):
        asked.encode(Question(tuple(twice)))


def test_windows_of_attention_hold_no_more_than_they_reach(tmp_path: Path) -> None:
    """Every other layer of this Gemma sees 24 tokens; layers behind a drop keep what is kept."""
    folder = build_folder("gemma3", tmp_path)
    question = Question.from_prompt("Which shape is on the left? The circle.", [SMALL, TALL])
    dense = answerer(folder)([question])[0]
    assert dense.tokens_in > 23
    assert dense.kv_entries == 2 * 23 + 2 * dense.tokens_in
    options = {"layer": 1, "fraction": 0.4}
    pruned = answerer(folder, keep=0.7, method="fastv", options=options)([question])[0]
    assert pruned.kv_entries == 23 + pruned.tokens_in + 2 * pruned.tokens_stage2


def test_a_processor_without_turns_takes_one_question(tmp_path: Path) -> None:
    asked = answerer(build_folder("paligemma", tmp_path))
    encoded = asked.encode(Question.from_prompt("Is <image> left?", [SMALL]))
    text = asked.processor.tokenizer.decode(encoded.inputs["input_ids"])
    assert text == "<image>" * 16 + "<s>Is left?\n"
    with pytest.raises(ValueError, match="answers one question"):
        asked.encode(Question(tuple(turns("What?", "blue", "Sure?"))))
    with pytest.raises(ValueError, match="images"):
        asked.encode(Question.from_prompt("green blue yellow"))


def test_several_images_of_a_row_are_not_cut_into_tiles_where_the_family_says_so(
    tmp_path: Path,
) -> None:
    asked = answerer(build_folder("llava_onevision", tmp_path))
    alone = asked.encode(Question.from_prompt("What colour?", [WIDE]))
    both = asked.encode(Question.from_prompt("What colour?", [WIDE, TALL]))
    assert both.inputs["batch_num_images"].tolist() == [2]
    ids = asked.visual_ids
    assert torch.isin(alone.inputs["input_ids"], ids).sum() > 17
    assert torch.isin(both.inputs["input_ids"], ids).sum() == 2 * 17


# -------------------------------------------------------------------------------------- batches
def test_rows_of_unlike_tiles_are_filled_up() -> None:
    rows = [
        {"input_ids": torch.tensor([1, 2]), "pixel_values": torch.ones(1, 5, 3, 4, 4)},
        {"input_ids": torch.tensor([3])},
        {"input_ids": torch.tensor([4]), "pixel_values": torch.ones(2, 3, 3, 2, 4)},
    ]
    batch = join(rows, pad_token_id=9, side="left")
    assert batch["input_ids"].tolist() == [[1, 2], [9, 3], [9, 4]]
    pixels = batch["pixel_values"]
    assert pixels.shape == (3, 5, 3, 4, 4)
    assert bool(pixels[0].all())
    assert pixels[1:].sum() == 2 * 3 * 3 * 2 * 4
    assert not pixels[1:, 3:].any()
    assert not pixels[1:, :, :, 2:].any()


def test_images_that_are_no_batch_are_refused() -> None:
    rows = [
        {"input_ids": torch.tensor([1]), "pixel_values": torch.ones(1, 3, side, side)}
        for side in (4, 8)
    ]
    with pytest.raises(ValueError, match="use a batch size of 1"):
        join(rows, pad_token_id=0, side="right")


# -------------------------------------------------------------------------- what is not installed
@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is there")
def test_a_processor_that_needs_torchvision_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build("qwen2_5_vl")
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "processor_class": "Qwen2_5_VLProcessor",
                "image_processor_type": "Qwen2VLImageProcessor",
            }
        )
    )
    load_processor_words(tmp_path)
    with pytest.raises(ValueError, match=r"needs the package torchvision.*pip install torchvision"):
        load_pretrained(tmp_path, keep=0.5)
    capsys.readouterr()
    assert main(["infer", "--model", str(tmp_path), "--prompt", "What?"]) == 1
    told = capsys.readouterr().err
    assert "torchvision" in told
    assert told.count("\n") == 1
    with attach(model, PruneConfig("topk_cls", keep=0.5)) as attached:
        assert attached.keep == 0.5


def load_processor_words(folder: Path) -> None:
    """The tokenizer of a folder whose processor cannot be built."""
    tokenizer("<|im_start|>", "<|im_end|>", **QWEN_TOKENS).save_pretrained(folder)


def test_a_folder_without_a_processor_is_one_sentence(tmp_path: Path) -> None:
    build("gemma3").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="processor") as caught:
        load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_loaded_models_need_no_processor_to_be_attached() -> None:
    model = build("qwen2_vl")
    loaded = Loaded(model, None, attach(model, PruneConfig("random", keep=0.5)))
    assert loaded.attached is not None
    loaded.attached.detach()
