"""Mode `qlora`: what is in 4 bits, exact gradients, evaluation aside, folders that merge."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from itprune import PromptFormat, PruneConfig, attach, checkpoint
from itprune.cli import main
from itprune.families import find_family
from tests.family_models import NAMES, build
from tests.models import ASSISTANT, batch, tiny_llava
from tests.oracle import drops_of, masked, recorded_rows
from tests.train.helpers import losses, recipe_values, train_here, write_data, write_recipe
from train.model import base_of, load_model, load_processor
from train.quant import keep_layout, quantization
from train.recipe.config import Recipe, load_recipe
from train.recipe.sections import QuantSection

PRUNED = "prune.keep=0.4"
QLORA = "model.mode=qlora"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def train(tiny_llava_folder: Path, data: Path, tmp_path: Path) -> Any:
    def start(*overrides: str, name: str = "out") -> Path:
        return train_here(tiny_llava_folder, data, tmp_path / name, QLORA, *overrides)

    return start


def recipe_of(folder: Path, base: Path, *overrides: str) -> Recipe:
    values = recipe_values(base, folder / "d.json", folder / "out")
    return load_recipe(write_recipe(folder / "r.yaml", values), overrides)


# ------------------------------------------------------------------------- what is in 4 bits
@pytest.mark.parametrize("name", NAMES)
def test_of_every_family_the_decoder_alone_is_quantised(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    target = "lora.target=[q_proj, v_proj]"
    model = load_model(recipe_of(tmp_path, tmp_path, QLORA, target), bf16=False)
    base = base_of(model)
    decoder = set(find_family(base).text_model.modules())
    packed = {m for m in base.modules() if isinstance(m, Linear4bit)}
    whole = {m for m in base.modules() if type(m) is torch.nn.Linear}
    adapters = {m for n, m in base.named_modules() if ".lora_" in n}
    assert packed
    assert packed <= decoder
    assert not (whole - adapters) & decoder


def test_four_bits_take_a_quarter_and_the_rest_keeps_its_type(
    tiny_llava_folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, tiny_llava_folder, QLORA)
    model = load_model(recipe, bf16=True)
    dense = load_model(recipe_of(tmp_path, tiny_llava_folder), bf16=True)
    packed = {n: m for n, m in base_of(model).named_modules() if isinstance(m, Linear4bit)}
    assert len(packed) == 4 * 7
    half = {n: m.weight for n, m in base_of(dense).named_modules() if n in packed}
    assert sum(p.nbytes for p in half.values()) == 4 * sum(m.weight.nbytes for m in packed.values())
    scales = sum(m.weight.quant_state.absmax.nbytes for m in packed.values())
    assert scales == sum(p.numel() for p in half.values()) / 64  # a byte for 64 weights: double
    assert {m.weight.quant_state.quant_type for m in packed.values()} == {"nf4"}
    assert {m.compute_dtype for m in packed.values()} == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if parameter.requires_grad else torch.bfloat16
        assert parameter.dtype == (torch.uint8 if "proj.base_layer.weight" in name else wanted)


def test_the_quant_section_is_heard(tiny_llava_folder: Path, tmp_path: Path) -> None:
    options = (QLORA, "quant.type=fp4", "quant.double=false")
    model = load_model(recipe_of(tmp_path, tiny_llava_folder, *options), bf16=False)
    states = [m.weight.quant_state for m in model.modules() if isinstance(m, Linear4bit)]
    assert {(s.quant_type, s.nested, s.dtype) for s in states} == {("fp4", False, torch.float32)}


def test_a_base_that_is_quantised_already_is_refused(
    tiny_llava_folder: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_llava_folder, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^model.path: .*quantised already"):
        load_model(recipe_of(tmp_path, base, QLORA), bf16=False)


# --------------------------------------------------------------------------------- gradients
def dequantised(model: torch.nn.Module, dense: torch.nn.Module) -> None:
    """Gives the dense model the rounded weights."""
    packed = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    for name, module in packed.items():
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
        dense.get_submodule(name).weight.data.copy_(weight)


def question(base: Path) -> dict[str, torch.Tensor]:
    texts = ["USER: What is 1? ASSISTANT: One.", "USER: Say yes. ASSISTANT: yes yes yes"]
    found = dict(load_processor(str(base))(text=texts, return_tensors="pt", padding=True))
    return {**found, "labels": found["input_ids"]}


def test_gradients_are_those_of_the_rounded_weights_also_after_an_evaluation(
    tiny_llava_folder: Path, tmp_path: Path
) -> None:
    model = load_model(recipe_of(tmp_path, tiny_llava_folder, QLORA), bf16=False).train()
    dense = load_model(recipe_of(tmp_path, tiny_llava_folder), bf16=False).train()
    draw = torch.Generator().manual_seed(3)
    for (name, a), b in zip(model.named_parameters(), dense.parameters(), strict=True):
        if "lora_B" in name:  # zeros would keep every gradient from lora_A
            a.data.copy_(torch.randn(a.shape, generator=draw) * 0.1)
            b.data.copy_(a.data)
    dequantised(model, dense)
    data = question(tiny_llava_folder)
    model.eval()
    with torch.no_grad():  # where weights would be packed into a layout without gradients
        model(**data)
    for each in (model.train(), dense):
        each(**data).loss.backward()
    compared = 0
    for (name, a), b in zip(model.named_parameters(), dense.parameters(), strict=True):
        if ".lora_" in name:
            assert a.grad is not None, name
            assert torch.cosine_similarity(a.grad.flatten(), b.grad.flatten(), 0) > 0.9999, name
            compared += 1
    assert compared == 4 * 7 * 2


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The engine's tiny model with a decoder in 4 bits."""
    folder = tmp_path_factory.mktemp("packed")
    tiny_llava().save_pretrained(folder)
    quant = quantization(QuantSection(), str(folder), torch.float32)
    model = LlavaForConditionalGeneration.from_pretrained(folder, quantization_config=quant)
    keep_layout(model)
    return model.train()


def test_keep_one_is_the_bare_model_in_four_bits(packed: Any) -> None:
    data = batch()
    bare = packed(**data)
    with attach(packed, PruneConfig(keep=1.0), prompt=PromptFormat((0, 1, 2, *ASSISTANT))):
        assert torch.equal(packed(**data).loss, bare.loss)


def test_dropping_is_masking_in_four_bits(packed: Any) -> None:
    data, prompt = batch(), PromptFormat((0, 1, 2, *ASSISTANT), ASSISTANT)
    results = []
    with attach(packed, PruneConfig("hash_choice", keep=0.5), prompt=prompt):
        with recorded_rows(packed) as found:
            results.append(packed(**data).loss)
        drops = drops_of(found)
    assert any(gone is not None and gone.any() for gone in drops)
    with masked(packed, drops):
        results.append(packed(**data).loss)
    projector = packed.model.multi_modal_projector.linear_1.weight
    gradients = [torch.autograd.grad(loss, projector)[0] for loss in results]
    assert torch.allclose(results[0], results[1], atol=1e-5)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[1].abs().max()


# -------------------------------------------------------------------------------------- runs
def test_an_evaluation_in_the_middle_changes_nothing(
    train: Any, data: Path, tiny_llava_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train(name="plain")  # dense: calibration would run without gradients before it
    said = re.search(r"training ([\d,]+) of ([\d,]+) weights", capsys.readouterr().out)
    assert said is not None
    trained, total = (int(figure.replace(",", "")) for figure in said.groups())
    weights = load_file(tiny_llava_folder / "model.safetensors").values()
    assert total - trained == sum(weight.numel() for weight in weights)
    val = (f"data.val={data}", "trainer.eval_strategy=steps", "trainer.eval_steps=1")
    assert losses(train(*val, name="evaluated")) == losses(plain)


def test_a_resumed_run_has_the_same_curve(train: Any) -> None:
    options = (PRUNED, "trainer.save_strategy=steps", "trainer.save_steps=2", "lora.dropout=0.2")
    expected = losses(whole := train(*options))
    shutil.rmtree(whole / "checkpoint-4")
    assert losses(train(*options)) == expected


def test_checkpointing_of_both_kinds_changes_nothing(train: Any) -> None:
    plain = losses(train(PRUNED, name="plain"))
    again = "trainer.gradient_checkpointing=true"
    for reentrant in ("false", "true"):
        kind = f"trainer.gradient_checkpointing_kwargs={{use_reentrant: {reentrant}}}"
        assert losses(train(PRUNED, again, kind, name=reentrant)) == pytest.approx(plain, abs=1e-5)


def test_adapters_answer_and_merge_into_the_whole_weights(
    train: Any, tiny_llava_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = train(PRUNED, "trainer.learning_rate=0.05")
    record = json.loads((output / "adapter_config.json").read_text())
    assert record["base_model_name_or_path"] == str(tiny_llava_folder)
    merged = tmp_path / "merged"
    assert main(["merge", "--model", str(output), "--output", str(merged)]) == 0
    before, after = (load_file(f / "model.safetensors") for f in (tiny_llava_folder, merged))
    adapter = load_file(output / "adapter_model.safetensors")
    name = "language_model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.model.{name}.lora_{x}.weight"] for x in "AB")
    (key,) = (k for k in before if k.endswith("layers.1.mlp.up_proj.weight"))
    assert b.abs().max() > 0.01
    assert torch.allclose(after[key], before[key] + 2 * b @ a, atol=1e-6)  # alpha / r = 2
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    ask = ("--prompt", "What colour?", "--max-new-tokens", "5", "--json")
    answers = []
    for folder in (output, merged):
        capsys.readouterr()
        assert main(["infer", "--model", str(folder), *ask]) == 0
        answers.append(json.loads(capsys.readouterr().out)["answer"])
    assert answers[0] == answers[1]
    assert checkpoint.load_pretrained(output).attached is not None
