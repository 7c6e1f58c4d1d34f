"""`itprune merge` changes no answer; `itprune calibrate` makes the average meet its target."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from itprune import PromptFormat, PruneConfig, attach, load_pretrained, save_pretrained
from itprune.answer import Answer, Answerer
from itprune.checkpoint import PrunerRecord
from itprune.cli import main
from itprune.decoding import Decoding
from itprune.question import Question, open_image


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA and a trained projector on the base, with a pruner and a recipe."""
    folder = tmp_path_factory.mktemp("adapter")
    loaded = load_pretrained(base, device="cpu")
    targets = r"model\.language_model\..*\.(q_proj|down_proj)"
    lora = LoraConfig(r=4, target_modules=targets, modules_to_save=["multi_modal_projector"])
    model = get_peft_model(loaded.model, lora)
    draw = torch.Generator().manual_seed(5)
    for weight in (p for p in model.parameters() if p.requires_grad):
        weight.data += torch.randn(weight.shape, generator=draw) * 0.2
    prompt = PromptFormat.from_processor(loaded.processor)
    attached = attach(model, PruneConfig(keep=None), prompt=prompt)
    save_pretrained(folder, model, loaded.processor, attached, {"model": {"path": "tiny"}})
    return folder


@pytest.fixture
def asked(pictures: Path) -> list[Question]:
    images = [open_image(pictures / f"{i}.png") for i in range(3)]
    prompts = ("What colour?", "Which shape is on the left?", "Is <image> red ?")
    return [Question.from_prompt(p, [i]) for p, i in zip(prompts, images, strict=True)]


def answers(folder: Path, asked: list[Question], keep: float | None = None) -> list[list[Any]]:
    loaded = load_pretrained(folder, keep=keep, device="cpu")

    def short(a: Answer) -> list[Any]:
        return [a.answer, a.tokens_in, a.visual_stage1, a.visual_stage2, a.kv_entries]

    return [short(a) for a in Answerer(loaded, Decoding(max_new_tokens=6))(asked)]


def test_a_merged_folder_answers_alike(
    adapter: Path,
    base: Path,
    asked: list[Question],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    merged = tmp_path / "made" / "merged"
    capfd.readouterr()
    log = [{"step": 2, "epoch": 0.5, "eval_loss": 0.625}]
    (adapter / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert main(["merge", "--model", str(adapter), "--output", str(merged)]) == 0
    assert capfd.readouterr().out == f"merged {adapter} into {merged}\n"
    expected = answers(adapter, asked)
    assert answers(merged, asked) == expected
    assert expected != answers(base, asked)
    assert not (merged / "adapter_config.json").exists()
    card = (merged / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "| method | `itprune` |" in card
    assert "| 2 | 0.5 | 0.625 |" in card
    assert PrunerRecord.read(merged) == PrunerRecord.read(adapter)
    assert "itprune" not in (merged / "config.json").read_text()
    assert [path.name for path in merged.parent.iterdir()] == ["merged"]

    model = AutoModelForImageTextToText.from_pretrained(merged).eval()
    assert model.dtype == torch.float32
    processor = AutoProcessor.from_pretrained(merged)
    for question, dense in zip(asked, answers(adapter, asked, keep=1.0), strict=True):
        text = processor.apply_chat_template(list(question.messages), add_generation_prompt=True)
        images = list(question.images)
        inputs = processor(text=text, images=images, add_special_tokens=False, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(new, skip_special_tokens=True).strip() == dense[0]


def test_merge_writes_the_wanted_type(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    options = ["--model", str(adapter), "--output", str(out), "--dtype", "bfloat16"]
    assert main(["merge", *options]) == 0
    assert AutoModelForImageTextToText.from_pretrained(out).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("model", "output", "reason"),
    [
        ("checkpoint", "new", "holds no adapter"),
        ("adapter", "full", "exists already; name a new folder"),
        ("adapter", "full/file", "exists already"),
        ("adapter", "full/file/new", "cannot be written"),
        ("nowhere", "new", "no such checkpoint folder"),
    ],
)
def test_merge_refuses(
    adapter: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: Any,
    model: str,
    output: str,
    reason: str,
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    folders = {"adapter": adapter, "checkpoint": checkpoint, "nowhere": tmp_path / "nowhere"}
    command = ["merge", "--model", str(folders[model]), "--output", str(tmp_path / output)]
    assert main(command) == 1
    told = capsys.readouterr().err
    assert reason in told
    assert told.count("\n") == 1
    assert (tmp_path / "full" / "file").read_text() == "mine"


# -------------------------------------------------------------------------------- calibrate
def test_calibrate_makes_an_ordinary_folder_meet_its_target(
    base: Path, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    command = ["calibrate", "--model", str(folder), "--data", str(pictures), "--device", "cpu"]
    assert main([*command, "--keep", "0.5"]) == 0
    told = capsys.readouterr().out
    assert "calibrated on 6 images" in told
    assert "stage1: the rule alone keeps" in told
    record = PrunerRecord.read(folder)
    assert record.config == PruneConfig(keep=0.5)
    assert record.calibration is not None
    assert record.calibration.rules == {"stage1": "mean", "stage2.1": "mean"}
    images = [open_image(path) for path in sorted(pictures.iterdir())]
    asked = [Question.from_prompt("Describe the image.", [image]) for image in images]
    found = Answerer(load_pretrained(folder, device="cpu"), Decoding(max_new_tokens=1))(asked)
    mean = sum(a.visual_layer_average for a in found) / len(found)
    assert abs(mean - 0.5) < 0.04  # 16 visual tokens an image: counts are coarse
    assert not list(folder.glob("*.partial"))


def test_calibrate_keeps_what_the_record_held(
    adapter: Path, pictures: Path, tmp_path: Path
) -> None:
    data = [
        {"image": f"{i}.png", "conversations": [{"from": "human", "value": "<image>\nred?"}]}
        for i in range(6)
    ] + [{"image": "none.png", "conversations": [{"from": "human", "value": "<image>\nred?"}]}]
    listed = tmp_path / "data.json"
    listed.write_text(json.dumps(data))
    before = (adapter / "pruner.json").read_bytes()
    out = tmp_path / "elsewhere"
    command = ["calibrate", "--model", str(adapter), "--data", str(listed), "--keep", "0.3"]
    command += ["--image-root", str(pictures), "--limit", "4", "--output", str(out)]
    assert main([*command, "--device", "cpu"]) == 0
    assert (adapter / "pruner.json").read_bytes() == before
    record = PrunerRecord.read(out)
    assert record.recipe == {"model": {"path": "tiny"}}
    assert record.config.keep == 0.3
    assert record.calibration is not None
    assert record.calibration.samples == 4


@pytest.mark.parametrize(
    ("data", "options", "reason"),
    [
        ("missing.json", [], "cannot be read"),
        ("empty", [], "holds no images"),
        ("none.json", [], "holds no samples"),
        ("broken.json", [], "broken.json:2: not valid JSON"),
        ("broken.jsonl", [], "broken.jsonl:2: not valid JSON"),
        ("bad.jsonl", [], "calibration needs samples with images"),
        ("bad.jsonl", ["--limit", "0"], "--limit: must be at least 1"),
        ("bad.jsonl", ["--keep", "1.0"], "keep is 1.0, which prunes nothing"),
        ("bad.jsonl", ["--method", "uniform"], "has nothing to calibrate"),
    ],
)
def test_calibrate_refuses(
    checkpoint: Path, tmp_path: Path, capsys: Any, data: str, options: list[str], reason: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "broken.json").write_text('[{"prompt": "a"},\n oops]')
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\noops\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "image": "gone.png"}\n')
    before = (checkpoint / "pruner.json").read_bytes()
    command = ["calibrate", "--model", str(checkpoint), "--data", str(tmp_path / data)]
    assert main([*command, "--device", "cpu", *options]) == 1
    told = capsys.readouterr().err
    assert reason in told
    assert "Traceback" not in told
    assert (checkpoint / "pruner.json").read_bytes() == before
