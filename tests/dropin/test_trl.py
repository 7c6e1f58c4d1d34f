"""docs/drop-in.md with TRL's SFTTrainer: its own collator, losses, packing and numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, set_seed

from itprune import Attached, PromptFormat, PruneConfig, PrunerCallback, attach, load_pretrained
from tests.dropin.page import SAMPLES, answers, prepare, run
from tests.oracle import drops_of, masked, recorded_rows

trl = pytest.importorskip("trl", reason="the extra `trl` is not installed")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.xdist_group("drop_in_trl")
KINDS = ("completion", "assistant", "messages")


@pytest.fixture(scope="module")
def place(tiny_llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = prepare(tmp_path_factory.mktemp("drop_in_trl"), tiny_llava_folder)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def rows(kind: str) -> Any:
    """The pictures and answers as TRL takes them; the last sample is all text."""
    found = []
    for index, (name, answer) in enumerate(answers()):
        ask = [{"role": "user", "content": "What colour?"}]
        say = [{"role": "assistant", "content": answer}]
        text = (
            {"prompt": ask, "completion": say} if kind == "completion" else {"messages": ask + say}
        )
        found.append({"images": [Image.open(name)] if index < SAMPLES - 1 else [], **text})
    return datasets.Dataset.from_list(found)


def trainer_of(place: Path, kind: str, keep: float = 0.3, **options: Any) -> tuple[Any, Attached]:
    """An SFTTrainer with adapters and the two statements behind it."""
    set_seed(0)
    processor = AutoProcessor.from_pretrained("llava-1.5-7b-hf")
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": None, **options}
    data = options.pop("data", None) or rows(kind)
    trainer = trl.SFTTrainer(
        LlavaForConditionalGeneration.from_pretrained("llava-1.5-7b-hf"),
        trl.SFTConfig(
            f"outputs/{kind}",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
            learning_rate=1e-3,
            assistant_only_loss=kind == "assistant",
            **options,
        ),
        train_dataset=data,
        eval_dataset=data,
        processing_class=processor,
        peft_config=LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)"),
    )
    prompt = PromptFormat.from_processor(processor)
    attached = attach(trainer.model, PruneConfig(keep=keep), prompt=prompt)
    samples = 0 if kind == "text" else 256  # without pictures there is nothing to calibrate on
    PrunerCallback(attached, processor, calibration_samples=samples).add_to(trainer)
    return trainer, attached


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_the_page_runs(place: Path) -> None:
    names = run("TRL's SFTTrainer")
    first = names["trainer"].state.log_history[0]
    assert {"entropy", "mean_token_accuracy", "kept_average", "keep"} < set(first)
    assert first["kept_average"] < 0.5
    for folder in ("outputs/trl", "outputs/trl/checkpoint-2"):
        assert load_pretrained(folder).attached.calibration.samples == SAMPLES
    assert "- itprune\n" in Path("outputs/trl/README.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_numbers_are_those_of_masking(kind: str, place: Path) -> None:
    """Whatever is supervised, in training and in evaluation."""
    trainer, attached = trainer_of(place, kind, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert len(logged(trainer, "eval_loss")) == len(logged(trainer, "eval_kept_average")) == 2
    assert 0.2 < logged(trainer, "kept_average")[0] < 0.45
    data = rows(kind)
    batch = trainer.data_collator([data[i] for i in (0, 2, SAMPLES - 1)])
    inner = trainer.model.get_base_model()
    found = {}
    for mode in ("train", "eval"):
        trainer.model.train(mode == "train")
        with recorded_rows(inner) as rows_of:
            found[mode] = numbers(trainer, mode, batch)
    visual = attached.report.visual_stage1
    assert visual[2] == 0  # the sample without a picture
    assert 0 < max(visual) < 16
    attached.detach()
    with masked(inner, drops_of(rows_of)):
        for mode in ("train", "eval"):
            trainer.model.train(mode == "train")
            assert found[mode] == pytest.approx(numbers(trainer, mode, batch), abs=1e-5)


@torch.no_grad()
def numbers(trainer: Any, mode: str, batch: dict[str, torch.Tensor]) -> list[float]:
    """Loss, entropy and accuracy of one batch, as TRL works them out."""
    loss = trainer.compute_loss(trainer.model, dict(batch))
    metrics = trainer._metrics[mode]
    return [float(loss), metrics["entropy"].pop(), metrics["mean_token_accuracy"].pop()]


def test_accumulated_batches_are_one(place: Path) -> None:
    whole, _ = trainer_of(place, "completion")
    parts, _ = trainer_of(
        place, "completion", per_device_train_batch_size=1, gradient_accumulation_steps=2
    )
    whole.train()
    parts.train()
    assert logged(parts) == pytest.approx(logged(whole), abs=1e-5)
    assert logged(parts, "kept_average") == logged(whole, "kept_average")


def test_losses_on_whole_logits_still_have_them(place: Path) -> None:
    """Label smoothing calls the model without labels."""
    with pytest.warns(FutureWarning, match="label_smoothing"):
        trainer, attached = trainer_of(place, "completion", label_smoothing_factor=0.1, max_steps=1)
    trainer.train()
    assert logged(trainer)[0] > 0
    assert attached.report.visual_stage1 != attached.report.visual_in


@pytest.mark.parametrize("option", ["packing", "padding_free"])
def test_pictures_cannot_be_packed(option: str, place: Path) -> None:
    with pytest.raises(ValueError, match="not supported for vision"):
        trainer_of(place, "messages", **{option: True})


def test_packed_text_is_as_without_a_pruner(place: Path) -> None:
    turns = [
        [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "a" * i}]
        for i in range(SAMPLES)
    ]
    data = datasets.Dataset.from_list([{"messages": turn} for turn in turns])
    losses = []
    for pruned in (True, False):
        trainer, attached = trainer_of(
            place, "text", data=data, packing=True, max_length=64, eval_packing=False
        )
        if not pruned:
            attached.detach()
        trainer.train()
        losses.append(logged(trainer))
    assert losses[0] == losses[1]
