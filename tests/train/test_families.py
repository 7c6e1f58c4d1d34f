"""Every family through the real training path: recipe, processor, collator, trainer, checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from itprune.checkpoint import load_pretrained
from itprune.cli import main
from itprune.families import find_family
from launch.train import main as train
from tests.family_models import NAMES, batch, build
from tests.tiny_folders import MAKERS, build_folder
from tests.train.helpers import history, losses, recipe_values, turn, write_data, write_recipe
from train.blank import BlankImage
from train.data.encode import IGNORED, Encoder
from train.data.images import ImageOpener
from train.data.llava import llava_sample
from train.data.sample import BadSample
from train.model import load_processor, parts_of, projector_names

WITHOUT_TEXT = ("paligemma",)
"""Families whose processor takes no row of text alone, and one question a row."""


ENDS = ("</s>", "<|im_end|>", "<end_of_utterance>", "<end_of_turn>")
"""What ends an answer, by the template or the tokenizer."""


@pytest.fixture(scope="module", params=MAKERS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_folder(request.param, tmp_path_factory.mktemp(request.param) / "base")


def name_of(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text())["model_type"])


def data_for(base: Path, folder: Path) -> Path:
    """Pictures of several sizes, one or two in a row; text and several turns where they can be."""
    if name_of(base) in WITHOUT_TEXT:
        path = write_data(folder, 12, text_every=99)
        records = [r for r in json.loads(path.read_text()) if len(r["conversations"]) == 2]
    else:
        path = write_data(folder, 12, text_every=4)
        records = json.loads(path.read_text())
    names = [r["image"] for r in records if "image" in r]
    Image.new("RGB", (60, 200), "red").save(folder / "images/tall.png")
    both = [turn("human", "<image>\n<image>\nAre they alike?"), turn("gpt", "no")]
    records.insert(1, {"image": [names[0], "images/tall.png"], "conversations": both})
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def run(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Trains by the command line; returns the output folder."""
    data = data_for(base, tmp_path / "data")

    def start(*overrides: str, name: str = "out", **trainer: Any) -> Path:
        trainer = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, **trainer}
        values = recipe_values(base, data, tmp_path / name, use_cpu=True, **trainer)
        recipe = write_recipe(tmp_path / f"{name}.yaml", values)
        status = train([str(recipe), *overrides])
        assert status == 0, capsys.readouterr().err
        return tmp_path / name

    return start


def test_pruned_adapters_train_infer_merge_and_calibrate(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run("prune.keep=0.5", "prune.method=itprune")
    for step in history(output):
        assert 0 < step["kept_stage2"] <= step["kept_stage1"] < 1
        assert step["bad_samples"] == 0
    picture = tmp_path / "picture.png"
    Image.new("RGB", (150, 90), "blue").save(picture)
    ask = ("--image", str(picture), "--prompt", "What colour?", "--max-new-tokens", "4", "--json")

    def answer(folder: Path) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["infer", "--model", str(folder), *ask]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    trained = answer(output)
    assert trained["visual_stage2"] < trained["visual_in"]
    assert main(["doctor", "--model", str(output), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pruning"]["method"], found["pruning"]["keep"]) == ("itprune", 0.5)
    assert found["missing"] == []
    merged = tmp_path / "merged"
    assert main(["merge", "--model", str(output), "--output", str(merged)]) == 0
    again = answer(merged)
    for figure in ("answer", "visual_in", "visual_stage1", "visual_stage2"):
        assert again[figure] == trained[figure]
    pictures = str(tmp_path / "data/images")
    command = ["calibrate", "--model", str(merged), "--data", pictures, "--limit", "6"]
    assert main(command) == 0
    assert "calibrated on 6 images" in capsys.readouterr().out


def test_keep_one_is_the_dense_run(run: Any) -> None:
    assert losses(run("prune.keep=1.0", name="whole")) == losses(run(name="dense"))


def test_accumulation_gives_the_same_curve_with_uneven_answers(run: Any) -> None:
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    once, split = run("prune.keep=0.5", name="once"), run("prune.keep=0.5", name="split", **parts)
    assert losses(split) == pytest.approx(losses(once), abs=1e-4)


@pytest.mark.parametrize("mode", ["projector", "full"])
def test_a_mode_moves_its_parts_only(run: Any, base: Path, mode: str) -> None:
    output = run(f"model.mode={mode}", "lora=null", "prune.keep=0.5", "trainer.max_steps=2")
    before, after = (load_pretrained(f, keep=1.0, device="cpu").model for f in (base, output))
    parts, new = parts_of(before), dict(after.named_parameters())
    moved = {
        parts[name] for name, weight in before.named_parameters() if not weight.equal(new[name])
    }
    assert moved == ({"projector"} if mode == "projector" else {"projector", "language"})


def test_the_encoder_trains_with_batches_of_text_between(run: Any, base: Path) -> None:
    """Rows one by one: some batches have no image, and the blank one stands in."""
    overrides = ("model.mode=full", "model.freeze=[]", "lora=null", "prune.keep=0.5")
    output = run(*overrides, per_device_train_batch_size=1, max_steps=6)
    assert all(loss > 0 for loss in losses(output))


def test_labels_are_the_answer_and_its_end(base: Path, tmp_path: Path) -> None:
    processor = load_processor(str(base))
    Image.new("RGB", (150, 90)).save(tmp_path / "a.png")
    record = {
        "image": "a.png",
        "conversations": [turn("human", "<image>\nWhat colour?"), turn("gpt", "It is red.")],
    }
    encoder, opener = Encoder(processor, 512), ImageOpener(tmp_path, strict=False)
    encoded = encoder(llava_sample(record), opener)
    labels = encoded["labels"]
    text = processor.tokenizer.decode(labels[labels != IGNORED]).strip()
    said, _, end = text.partition("It is red.")
    assert not said
    assert end.strip() in ENDS
    assert len(encoded["input_ids"]) == len(labels) == len(encoded["attention_mask"])
    with pytest.raises(BadSample, match="images need more than"):
        Encoder(processor, 5)(llava_sample(record), opener)


def test_turns_a_template_refuses_are_bad_samples(tmp_path: Path) -> None:
    turns = [turn("human", "a"), turn("human", "b"), turn("gpt", "c")]
    sample = llava_sample({"conversations": turns})
    opener = ImageOpener(tmp_path, strict=False)
    strict = load_processor(str(build_folder("gemma3", tmp_path / "gemma3")))
    with pytest.raises(BadSample, match=r"template refuses its turns .*alternate"):
        Encoder(strict, 512)(sample, opener)
    plain = load_processor(str(build_folder("paligemma", tmp_path / "paligemma")))
    with pytest.raises(BadSample, match="answers one question"):
        Encoder(plain, 512)(sample, opener)


# ------------------------------------------------------------------------- parts, for all families
@pytest.mark.parametrize("name", NAMES)
def test_every_weight_has_a_part(name: str) -> None:
    model = build(name)
    parts = parts_of(model)
    assert set(parts.values()) == {"vision", "projector", "language"}
    family = find_family(model)
    for module in family.projectors:
        for weight in module.parameters():
            assert parts[next(n for n, p in model.named_parameters() if p is weight)] == "projector"
    text = {n for n, part in parts.items() if part == "language"}
    assert all("language_model" in n or "text_model" in n or n.startswith("lm_head") for n in text)
    named = dict(model.named_modules())
    for module in projector_names(model):
        assert not isinstance(named[module], torch.nn.ModuleList)


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_heeds_the_number_of_supervised_tokens(name: str) -> None:
    """As our trainer relies on, whatever a model says of itself."""
    model = build(name)
    data = batch(name, model)
    count = (data["labels"][:, 1:] != IGNORED).sum()
    alone, among = model(**data).loss, model(**data, num_items_in_batch=2 * count).loss
    assert among.item() == pytest.approx(alone.item() / 2, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_blank_image_lets_text_reach_every_projector(name: str) -> None:
    model = build(name)
    parts = parts_of(model)
    for weight_name, weight in model.named_parameters():
        weight.requires_grad_(parts[weight_name] == "projector")
    text = batch(name, model, rows=((12, "answer"),))
    model.train()
    plain = model(**text).loss
    BlankImage(model)
    blank = model(**text).loss
    assert torch.equal(plain, blank)
    blank.backward()
    for weight_name, weight in model.named_parameters():
        if weight.requires_grad and "image_newline" not in weight_name:
            assert weight.grad is not None, weight_name
            assert not weight.grad.any()
