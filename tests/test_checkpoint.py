"""Oracle 6, second half: a folder saved here chooses the same tokens in another process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from itprune import PromptFormat, PruneConfig, attach, calibrate, load_pretrained, save_pretrained
from itprune.checkpoint import PRUNER_FILE
from tests.tiny_folders import build_folder

READ = """
import sys, torch
from itprune import load_pretrained
folder, data, out = sys.argv[1:]
loaded = load_pretrained(folder)
batch = torch.load(data, weights_only=True)
with torch.no_grad():
    logits = loaded.model(**batch).logits
report = loaded.attached.report
torch.save({"logits": logits, "drops": report.drops, "keep": loaded.attached.keep}, out)
"""


@pytest.fixture
def base(tiny_llava_folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava_folder)
    return model.eval(), LlavaProcessor.from_pretrained(tiny_llava_folder)


def inputs(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> dict:
    """Two rows: image and question, padded."""
    torch.manual_seed(3)
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    size = model.config.vision_config.image_size
    ids = processor.tokenizer(["what is here ?", "and what stands on the left side of it ?"])
    rows = [torch.tensor([image] * model.config.image_seq_length + r) for r in ids["input_ids"]]
    width = max(map(len, rows))
    pad = [torch.nn.functional.pad(r, (width - len(r), 0)) for r in rows]
    mask = [torch.arange(width) >= width - len(r) for r in rows]
    return {
        "input_ids": torch.stack(pad),
        "attention_mask": torch.stack(mask).long(),
        "pixel_values": torch.randn(2, 3, size, size),
    }


def elsewhere(folder: Path, data: dict, tmp_path: Path) -> dict:
    torch.save(data, tmp_path / "data.pt")
    names = [str(folder), str(tmp_path / "data.pt"), str(tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-c", READ, *names], check=True, capture_output=True)
    return torch.load(tmp_path / "out.pt", weights_only=True)


@pytest.mark.parametrize("adapter", [False, True])
def test_another_process_chooses_the_same(base, adapter: bool, tmp_path: Path, monkeypatch) -> None:
    model, processor = base
    if adapter:
        torch.manual_seed(0)
        model = get_peft_model(
            model,
            LoraConfig(
                target_modules=r".*language_model.*\.v_proj",
                modules_to_save=["multi_modal_projector"],
                init_lora_weights=False,
            ),
        ).eval()
    config = PruneConfig(keep=0.4, options={"stage1": {"rule": "iqr"}, "stage2": {"min_keep": 2}})
    attached = attach(model, config, prompt=PromptFormat.from_processor(processor))
    data = inputs(model, processor)
    calibrate(attached, [data])
    with torch.no_grad():
        logits = model(**data).logits
    save_pretrained(tmp_path / "run", model, processor, attached, recipe={"seed": 1})
    found = elsewhere(tmp_path / "run", data, tmp_path)
    assert found["drops"] == attached.report.drops
    assert found["keep"] == 0.4
    assert torch.equal(found["logits"], logits)
    record = json.loads((tmp_path / "run" / PRUNER_FILE).read_text())
    assert record["recipe"] == {"seed": 1}
    assert record["prune"]["stage1"]["rule"] == "iqr"
    assert record["prompt"]["assistant_prefix"]


def test_keep_and_method_can_be_overridden(base, tmp_path: Path) -> None:
    model, processor = base
    attached = attach(model, PruneConfig(keep=0.4))
    save_pretrained(tmp_path, model, processor, attached)
    attached.detach()
    data = inputs(model, processor)
    dense = load_pretrained(tmp_path, keep=1.0)
    assert torch.equal(dense.model(**data).logits, model(**data).logits)
    other = load_pretrained(tmp_path, method="uniform", keep=0.25)
    other.model(**data)
    expected = round(model.config.image_seq_length * 0.25)
    assert other.attached.report.visual_stage1 == [expected] * 2


def test_an_ordinary_model_folder_runs_dense(tiny_llava_folder: Path) -> None:
    assert load_pretrained(tiny_llava_folder).attached is None
    assert load_pretrained(tiny_llava_folder, keep=0.5).attached.keep == 0.5


def test_merging_folds_the_adapter(base, tmp_path: Path) -> None:
    model, processor = base
    torch.manual_seed(0)
    model = get_peft_model(
        model, LoraConfig(target_modules=r".*language_model.*\.v_proj", init_lora_weights=False)
    ).eval()
    attached = attach(model, PruneConfig(keep=0.5))
    data = inputs(model, processor)
    expected = model(**data).logits
    save_pretrained(tmp_path, model, processor, attached)
    merged = load_pretrained(tmp_path, merge=True)
    assert isinstance(merged.model, LlavaForConditionalGeneration)
    assert (merged.model(**data).logits - expected).abs().max() < 1e-5


def test_wrong_folders_get_one_sentence(base, tmp_path: Path) -> None:
    model, processor = base
    with pytest.raises(ValueError, match="no such checkpoint folder"):
        load_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match="not a model"):
        load_pretrained(tmp_path)
    attached = attach(model, PruneConfig(keep=0.4))
    save_pretrained(tmp_path, model, processor, attached)
    (tmp_path / PRUNER_FILE).write_text("{broken")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_pretrained(tmp_path)
    (tmp_path / PRUNER_FILE).write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format"):
        load_pretrained(tmp_path)


def test_untrained_parts_are_not_used(tiny_llava_folder: Path) -> None:
    for method in ("quecc", "topk_cls+dyvte"):
        with pytest.raises(ValueError, match=f"method '{re.escape(method)}' has trained parts"):
            load_pretrained(tiny_llava_folder, method=method, keep=0.5)


def test_values_no_model_can_be_made_of_are_one_sentence(tmp_path: Path) -> None:
    config = build_folder("gemma3", tmp_path) / "config.json"
    values = json.loads(config.read_text())
    values["text_config"]["num_hidden_layers"] = "four"
    config.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config.json: .*num_hidden_layers"):
        load_pretrained(tmp_path)
