"""Recipes that contradict themselves: one sentence with its place, before anything is loaded."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from itprune import PruneConfig, attach
from launch.train import main
from tests.models import batch, tiny_llava
from train.launcher import prepare_deepspeed
from train.recipe.arguments import training_arguments
from train.recipe.config import load_recipe

BASE = """\
model:
  path: some/model
data:
  train: data.json
lora:
  r: 8
trainer:
  output_dir: out
"""
QLORA = ("model.mode=qlora",)
FULL = ("model.mode=full", "lora=null")
PROJECTOR = ("model.mode=projector", "lora=null")
ROUTER = ("model.mode=router", "lora=null", "prune.method=dyvte", "prune.keep=null")
ZERO = "trainer.deepspeed=launch/deepspeed/zero2.json"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE)
    return path


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        # modes and their sections
        (("model.mode=qlora", "lora=null"), "model.mode: qlora needs a `lora` section"),
        (("model.mode=lora", "lora=null"), "model.mode: lora needs a `lora` section"),
        (("model.mode=full",), "model.mode: full does not use the `lora` section"),
        (
            (*FULL, "quant.type=nf4"),
            "quant: weights in 4 bits cannot train, and model.mode is full",
        ),
        (("quant.type=nf4",), "quant: weights in 4 bits cannot train, and model.mode is lora"),
        ((*QLORA, "model.dtype=float16"), "model.dtype: mode qlora chooses the types itself"),
        # freezing
        (("model.freeze=[projector]",), "model.freeze: mode lora says itself"),
        ((*QLORA, "model.freeze=[vision]"), "model.freeze: mode qlora says itself"),
        ((*PROJECTOR, "model.freeze=[pruner, language]"), "remove 'language'"),
        ((*ROUTER, "model.freeze=[pruner]"), "model.freeze: mode router trains the pruner"),
        # learning rates
        (("model.learning_rates.vision=1e-5",), "model.learning_rates.vision: nothing of this"),
        (("model.learning_rates.projector=1e-5",), "model.learning_rates.projector: nothing of"),
        ((*FULL, "model.learning_rates.vision=1e-5"), "model.learning_rates.vision: nothing"),
        ((*FULL, "model.learning_rates.pruner=1e-5"), "model.learning_rates.pruner: nothing"),
        ((*PROJECTOR, "model.learning_rates.language=1"), "model.learning_rates.language: nothing"),
        (("model.learning_rates.language=-1",), "model.learning_rates.language: must be 0 or more"),
        # routers
        (("model.mode=router", "lora=null"), "model.mode: router trains the routers of"),
        ((*ROUTER, "prune.exit_layer=3"), "prune.exit_layer: a fixed exit has no routers"),
        ((*ROUTER, "trainer.gradient_checkpointing=true"), "trainer.gradient_checkpointing: mode"),
        ((*ROUTER, "trainer.activation_checkpointing=true"), "trainer.activation_checkpointing: "),
        ((*ROUTER, "prune.keep=[0.4, 1.0]"), "prune.keep: mode router forces exits"),
        # data
        (
            ("data.max_tokens_per_batch=9", "trainer.auto_find_batch_size=true"),
            "trainer.auto_find_batch_size: data.max_tokens_per_batch says",
        ),
        (
            ("trainer.train_sampling_strategy=group_by_length",),
            "trainer.train_sampling_strategy: group_by_length would decode every sample",
        ),
        (
            ("data.max_tokens_per_batch=9", "trainer.train_sampling_strategy=sequential"),
            "trainer.train_sampling_strategy: sequential has no effect beside",
        ),
        (("data.streaming=true",), "data.streaming: a stream has no epochs"),
        (("data.weights=[1, 2]",), "data.weights: must be one for each entry of data.train"),
        (("data.weights=[-1]",), "data.weights: must be above 0"),
        (("data.weights=[0]",), "data.weights: must be above 0"),
        (("trainer.eval_strategy=steps",), "trainer.eval_strategy: an evaluation needs data.val"),
        (("prune.keep=0.4", "eval.keep=[0.2]"), "eval.keep: no evaluation runs"),
        ((*ROUTER, "distill.every=2"), "distill: mode router forces exits"),
        (("distill.every=2",), "distill: a dense run has no budgets"),
        (
            (
                "prune.keep=0.4",
                "distill.every=2",
                "trainer.use_liger_kernel=true",
                "trainer.liger_kernel_config={fused_linear_cross_entropy: true}",
            ),
            "distill: Liger's fused loss makes no logits",
        ),
        # transformers' own options
        (("trainer.fp16=true", "trainer.bf16=true"), "trainer.fp16: a run has one precision"),
        (("trainer.fp16=true", "trainer.use_cpu=true"), "trainer.fp16: half precision needs a GPU"),
        ((ZERO, "trainer.fsdp=full_shard"), "trainer.fsdp: runs without trainer.deepspeed"),
        ((ZERO, "trainer.torch_compile=true"), "trainer.torch_compile: DeepSpeed's hooks"),
    ],
)
def test_a_contradiction_is_one_sentence_with_its_place(
    recipe: Path, overrides: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        load_recipe(recipe, overrides)
    assert str(caught.value).startswith("command line: ")
    assert "\n" not in str(caught.value)


def test_the_place_is_the_line_of_the_key(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(BASE.replace("some/model", "some/model\n  mode: full"))
    assert main([str(recipe), "--check"]) == 2
    assert "recipe.yaml:3: model.mode: full does not use" in capsys.readouterr().err
    recipe.write_text(BASE + "quant:\n  type: nf4\n")
    assert main([str(recipe), "--check"]) == 2
    assert "recipe.yaml:9: quant: weights in 4 bits cannot train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("trainer.optim=adamw_of_mine", "trainer: adamw_of_mine is not a valid"),
        ("trainer.report_to=fax", "trainer.report_to: unknown name 'fax'"),
    ],
)
def test_check_tries_what_transformers_must_know(
    recipe: Path, capsys: pytest.CaptureFixture[str], override: str, sentence: str
) -> None:
    assert main([str(recipe), "trainer.use_cpu=true", override, "--check"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "overrides",
    [
        QLORA,
        (*QLORA, "quant.type=fp4", "trainer.bf16=true", "trainer.use_cpu=true"),
        (*FULL, "model.freeze=[language]", "model.learning_rates={vision: 0, projector: 1e-4}"),
        ("lora.train_projector=true", "model.learning_rates.projector=1e-4"),
        ("lora.modules_to_save=[vision_tower]", "model.learning_rates.vision=1e-6"),
        ("prune.method=quecc", "model.freeze=[pruner]"),
        ("data.streaming=true", "trainer.max_steps=10"),
        (ZERO, "trainer.gradient_checkpointing=true"),
        ROUTER,
    ],
)
def test_what_goes_together_is_accepted_and_resolves_to_itself(
    recipe: Path, overrides: tuple[str, ...]
) -> None:
    loaded = load_recipe(recipe, overrides)
    again = recipe.with_name("again.yaml")
    again.write_text(loaded.to_yaml())
    assert load_recipe(again) == loaded


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (QLORA, "model.mode: qlora needs bitsandbytes, which is not installed; pip install 'itp"),
        (("trainer.optim=paged_adamw_8bit",), "trainer.optim: paged_adamw_8bit needs bitsandbytes"),
    ],
)
def test_a_missing_package_is_named(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], sentence: str
) -> None:
    def missing(name: str, *args: Any) -> Any:
        return None if name == "bitsandbytes" else importlib.util.find_spec(name, *args)

    monkeypatch.setattr("train.recipe.contradictions.find_spec", missing)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_recipe(recipe, overrides)


def test_deepspeed_is_asked_for_where_it_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.recipe.contradictions.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^trainer.deepspeed: ZeRO needs deepspeed, .*\[train\]"):
        prepare_deepspeed(on_cpu=True)


def test_liger_leaves_the_loss_to_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"output_dir": str(tmp_path), "use_cpu": False, "use_liger_kernel": True}
    with pytest.raises(
        ValueError, match=r"^trainer.use_liger_kernel: liger-kernel is not installed"
    ):
        training_arguments(values, 0)
    monkeypatch.setattr("train.recipe.arguments.find_spec", lambda name: name)
    unfused = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert training_arguments(values, 0).liger_kernel_config == unfused
    named = {**values, "liger_kernel_config": {"rope": False, "cross_entropy": True}}
    wanted = {**unfused, "rope": False, "cross_entropy": True}
    assert training_arguments(named, 0).liger_kernel_config == wanted
    assert training_arguments({"output_dir": str(tmp_path)}, 0).liger_kernel_config is None


def test_what_transformers_adds_for_liger_changes_no_loss() -> None:
    model, inputs = tiny_llava().train(), batch()
    with attach(model, PruneConfig(keep=0.5)):
        assert torch.equal(model(**inputs).loss, model(**inputs, skip_logits=True).loss)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"use_liger_kernel": True}, "trainer.use_liger_kernel: its kernels need a GPU"),
        ({"fp16": True}, "trainer.fp16: half precision needs a GPU"),
    ],
)
def test_what_a_cpu_cannot_is_said_when_the_run_starts(
    tmp_path: Path, option: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        training_arguments({"output_dir": str(tmp_path), "use_cpu": True, **option}, 0)
