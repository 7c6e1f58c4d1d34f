"""What the encoder hands out is what the pruned model itself reads."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from itprune import load_pretrained
from itprune.decoding import Decoding
from itprune.question import Question
from itprune.serving.encoder import Encoder, Rows
from itprune.serving.wire import Draw, ImagesWire, PromptWire, payload
from tests import tiny_folders
from tests.serving.reference import Reference, picture, questions
from tests.serving.upstreams import build_wide
from tests.tiny_llava import MARKED, PLAIN

FAMILIES = ("llava", "llava_next", "llava_onevision", "internvl", "idefics3", "smolvlm")
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            where = tmp_path_factory.mktemp(name)
            build = tiny_folders.build_folder
            made[name] = build_wide(where, PLAIN) if name == "llava" else build(name, where)
        return made[name]

    return make


def first_logits(folder: Path, encoder: Encoder, rows: Rows) -> torch.Tensor:
    """Of the whole model on nothing but the rows that a server would get."""
    model: Any = load_pretrained(folder, device="cpu").model
    body = PromptWire(encoder).ask(rows)
    if "prompt" in body:
        given = {"input_ids": torch.tensor([body["prompt"]])}
    else:
        given = {"inputs_embeds": read(body["prompt_embeds"])[None]}
    with torch.no_grad():
        return model(**given).logits[0, -1]


def read(text: str) -> torch.Tensor:
    return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("keep", [0.4, 1.0])
def test_rows_are_what_the_pruned_model_reads(folder: Folder, name: str, keep: float) -> None:
    own = Reference(folder(name), keep)
    encoder = Encoder.load(folder(name), keep=keep, device="cpu")
    asked = questions()[:3]
    for question, rows in zip(asked, encoder.encode([*map(encoder.prepare, asked)]), strict=True):
        wanted, found = own.logits(question), first_logits(folder(name), encoder, rows)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        report = own.loaded.attached.report
        if question.images and keep < 1:
            assert rows.visual_kept == report.visual_stage1[0] < rows.visual_in
            assert rows.tokens_kept == report.tokens_stage1[0]


def test_the_language_model_is_not_loaded(folder: Folder) -> None:
    encoder = Encoder.load(folder("llava"), keep=0.4, device="cpu")
    text = encoder.family.text_model
    assert all(weight.is_meta for weight in text.layers.parameters())
    assert encoder.model.get_output_embeddings().weight.is_meta
    assert not any(weight.is_meta for weight in encoder.family.tower.parameters())


def test_a_whole_model_encodes_as_well(folder: Folder) -> None:
    whole = Encoder(load_pretrained(folder("llava"), keep=0.4, device="cpu"))
    half = Encoder.load(folder("llava"), keep=0.4, device="cpu")
    question = questions()[2]
    pairs = [one.encode([one.prepare(question)])[0] for one in (whole, half)]
    assert torch.equal(pairs[0].features, pairs[1].features)


def test_adapters_on_the_projector_count(folder: Folder, tmp_path: Path) -> None:
    loaded = load_pretrained(folder("llava"), device="cpu")
    plain = LoraConfig(target_modules=["linear_1", "q_proj"], init_lora_weights=False)
    get_peft_model(loaded.model, plain).save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    half = Encoder.load(tmp_path, keep=0.4, device="cpu")
    whole = Encoder(load_pretrained(tmp_path, keep=0.4, device="cpu", merge=True))
    base = Encoder.load(folder("llava"), keep=0.4, device="cpu")
    question = questions()[1]
    found, wanted, other = (
        one.encode([one.prepare(question)], keep=1.0)[0].features for one in (half, whole, base)
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (found - other).abs().max() > 0.01


def test_a_method_is_changed_and_comes_back(folder: Folder) -> None:
    encoder = Encoder.load(folder("llava"), keep=0.4, device="cpu")
    prepared = encoder.prepare(questions()[1])
    first = encoder.encode([prepared])[0]
    other = encoder.encode([prepared], "topk_cls", 0.25)[0]
    assert other.visual_kept == 4
    assert encoder.encode([prepared], "topk_cls", 1.0)[0].visual_kept == 16
    assert torch.equal(encoder.encode([prepared])[0].features, first.features)


def test_every_image_keeps_one_count_where_asked(folder: Folder) -> None:
    encoder = Encoder.load(folder("llava"), same_count=5, device="cpu")
    found = encoder.encode([*map(encoder.prepare, questions())])
    assert {count for rows in found for count in rows.images} == {5}
    assert encoder.methods == ("itprune",)
    assert encoder.usual_keep == pytest.approx(5 / 16)
    with pytest.raises(ValueError, match=r"keeps 5 tokens here; leave keep"):
        encoder.check("itprune", 0.9)


@pytest.mark.parametrize("count", [0, 1, 17])
def test_a_count_no_image_can_have(folder: Folder, count: int) -> None:
    with pytest.raises(ValueError, match=r"same_count: must be from 2 to the 16 tokens"):
        Encoder.load(folder("llava"), same_count=count, device="cpu")


def test_a_count_is_refused_where_images_have_line_ends(folder: Folder) -> None:
    with pytest.raises(ValueError, match="cannot all have one count"):
        Encoder.load(folder("llava_next"), same_count=5, device="cpu")


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("fastv", "works inside the language model"),
        ("visionzip+pyramiddrop", "works inside the language model"),
        ("sparsevlm", "language model"),
        ("cdpruner", "reads the question"),
        ("quecc", "reads the question|has trained parts"),
        ("vistog", "trained parts|language model|patches"),
        ("nonsense", "unknown method"),
    ],
)
def test_methods_that_need_the_language_model(folder: Folder, method: str, sentence: str) -> None:
    encoder = Encoder.load(folder("llava"), keep=0.4, device="cpu")
    assert method not in encoder.methods
    with pytest.raises(ValueError, match=sentence):
        encoder.check(method, 0.5)


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_families_that_need_more_than_rows(folder: Folder, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot be answered elsewhere .* itself"):
        Encoder.load(folder(name), device="cpu")


def test_images_cannot_be_sent_one_by_one_where_marks_stand_between(folder: Folder) -> None:
    encoder = Encoder.load(folder("idefics3"), keep=0.4, device="cpu")
    with pytest.raises(ValueError, match="--wire prompt"):
        ImagesWire(encoder)


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "internvl"])
def test_images_side_by_side_are_sent_one_by_one(folder: Folder, name: str) -> None:
    """Some templates write nothing between images, such as LLaVA-OneVision's."""
    encoder = Encoder.load(folder(name), keep=0.4, device="cpu")
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]
    pictures = (picture(1), picture(2, (56, 90)))
    apart = Question.from_prompt("<image> or <image>?", list(pictures))
    wanted = encoder.encode([encoder.prepare(apart)])[0]
    token = encoder.answerer.processor.image_token
    encoder.answerer.processor.chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        f"{token}{{% else %}}{{{{ c['text'] }}}}{{% endif %}}{{% endfor %}}{{% endfor %}}"
    )
    question = Question(({"role": "user", "content": parts},), pictures)
    prepared = encoder.prepare(question)
    for rows in encoder.encode([prepared, prepared]):
        assert rows.images == wanted.images
        body = ImagesWire(encoder).ask(rows)
        sent = [read(part["image_embeds"]) for part in body["messages"][0]["content"][:2]]
        for found, expected in zip(sent, wanted.each(), strict=True):
            torch.testing.assert_close(found, expected)


def test_what_is_sent_is_no_larger_than_its_rows() -> None:
    large = torch.randn(1000, 64)
    text = payload(large[3:5])
    assert torch.equal(read(text), large[3:5])
    assert len(text) < 4000


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_chat_request_says_what_training_saw(tmp_path: Path, template: str) -> None:
    encoder = Encoder.load(build_wide(tmp_path, template), keep=0.4, device="cpu")
    rows = encoder.encode([encoder.prepare(questions()[3])])[0]
    body = ImagesWire(encoder).ask(rows)
    assert body["add_special_tokens"] is (template == PLAIN)  # the other writes <s> itself
    assert [m["role"] for m in body["messages"]] == ["user", "assistant", "user"]
    said = body["messages"][1]["content"][0]["text"]
    assert said == ("The circle.</s>" if template == PLAIN else "The circle.")
    kinds = [part["type"] for part in body["messages"][0]["content"]]
    assert kinds == ["image_embeds", "text"]
    assert torch.equal(read(body["messages"][0]["content"][0]["image_embeds"]), rows.features)


def test_rows_may_be_sent_in_another_type(folder: Folder) -> None:
    encoder = Encoder.load(folder("llava"), keep=0.4, dtype=torch.bfloat16, device="cpu")
    rows = encoder.encode([encoder.prepare(Question.from_prompt("What?", [picture(0)]))])[0]
    assert read(PromptWire(encoder).ask(rows)["prompt_embeds"]).dtype == torch.bfloat16


def test_what_a_models_files_recommend_counts_as_it_does_here(folder: Folder) -> None:
    """vLLM takes from generation_config.json all that a request leaves out; `generate` does not."""
    answerer = Encoder.load(folder("llava"), keep=0.4, device="cpu").answerer
    neutral = {"top_k": 0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    body = Draw.of(answerer, Decoding(8)).to_body()
    assert {**neutral, "repetition_penalty": 1.0}.items() <= body.items()
    answerer.model.generation_config.repetition_penalty = 1.3
    answerer.model.generation_config.top_k = 7
    body = Draw.of(answerer, Decoding(8)).to_body()
    assert {**neutral, "repetition_penalty": 1.3}.items() <= body.items()
