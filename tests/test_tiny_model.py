"""The bundled model is an ordinary LLaVA folder that answers questions about unseen scenes."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from train.scenes import BASE, answers, write_dataset
from train.scenes.questions import SETS, scene_items
from train.scenes.render import sample_scenes
from train.tiny.captions import CAPTIONS
from train.tiny.evaluate import answer_all, by_kind, load, messages_until, open_pictures, swapped
from train.tiny.rows import PATCHES, RowBuilder
from train.tiny.tokenizer import build_tokenizer

FOLDER = Path(__file__).parents[1] / "assets" / "tiny-llava"


@pytest.fixture(scope="module")
def loaded():
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(FOLDER)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("tiny")
    return out, write_dataset(out, train=0, val=60, seed=123, questions="base")["val"]


def test_folder_is_small_and_half_precision() -> None:
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size < 12e6
    with safe_open(weights, "pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds == {"F16"}


def test_configuration_is_the_usual_llava(loaded) -> None:
    config = loaded[0].config
    assert config.vision_feature_layer == -2
    assert config.vision_feature_select_strategy == "default"
    assert config.image_seq_length == PATCHES
    size = sum(weight.numel() for weight in loaded[0].parameters())
    assert 2e6 < size < 8e6


def test_answers_held_out_scenes(loaded, data) -> None:
    model, processor = loaded
    out, samples = data
    pictures = open_pictures(out, samples)
    seen = by_kind(samples, answer_all(model, processor, samples, pictures))
    assert set(seen) == set(BASE)
    assert np.mean(list(seen.values())) >= 0.85
    shown = [i for i, picture in enumerate(pictures) if picture is not None]
    blind = answer_all(
        model, processor, [samples[i] for i in shown], swapped([pictures[i] for i in shown])
    )
    hits = [said == answers(samples[i]) for i, said in zip(shown, blind, strict=True)]
    assert np.mean(hits) < 0.5


def test_training_rows_hold_the_processors_tokens(loaded) -> None:
    tokenizer = build_tokenizer()
    processor = loaded[1]
    assert tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    builder = RowBuilder(tokenizer)
    rng = np.random.default_rng(0)
    items = scene_items(sample_scenes(rng, 1, "train", (4, 4), repeats=0.0), 0)
    for kind in [*SETS["all"].values(), *CAPTIONS.values()]:
        dialogue = kind(items, rng)
        if dialogue is None:
            continue
        conversation = []
        for question, answer in dialogue.turns:
            conversation += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        sample = {"conversations": conversation}
        if dialogue.image:
            sample["image"] = ""
        text = processor.apply_chat_template(messages_until(sample, len(dialogue.turns)))
        expected = tokenizer(text)["input_ids"]
        branch, _ = builder.branch(dialogue)
        if dialogue.image:
            image = processor.tokenizer.convert_tokens_to_ids("<image>")
            branch = [*builder.opening, image, *builder.newline, *branch]
        assert branch == expected, text


def test_assistant_marks_cover_answers_and_end(loaded) -> None:
    processor = loaded[1]
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "Which is larger, 3 or 7?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "7"}]},
    ]
    marked = processor.tokenizer.apply_chat_template(
        conversation,
        chat_template=processor.chat_template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    pairs = zip(marked["input_ids"], marked["assistant_masks"], strict=True)
    assert processor.tokenizer.decode([token for token, mark in pairs if mark]) == " 7</s>"
