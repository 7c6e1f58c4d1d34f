"""`itprune doctor CONFIG`: what it foretells is what a run does, and what stands against it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from itprune.cli import main
from itprune.families import find_family
from tests.train.helpers import recipe_values, write_data, write_recipe
from train.doctor.examine import Findings, build, examine
from train.doctor.memory import (
    Load,
    Setup,
    estimate,
    four_bit_bytes,
    four_bit_names,
    layer_bytes,
    state_bytes,
)
from train.model import add_lora, base_of, load_model
from train.recipe.config import load_recipe
from train.recipe.sections import LoraSection

ROOT = Path(__file__).resolve().parent.parent.parent
PRUNED = "prune.keep=0.4"
FULL = ("model.mode=full", "lora=null")
NOTHING = Load(0, 0, 0, 0)
Doctor = Callable[..., Findings]


@pytest.fixture
def values(tiny_llava_folder: Path, tmp_path: Path) -> dict[str, Any]:
    data = write_data(tmp_path / "data")
    return recipe_values(tiny_llava_folder, data, tmp_path / "run")


@pytest.fixture
def doctor(values: dict[str, Any], tmp_path: Path) -> Doctor:
    def run(*overrides: str, processes: int = 1, samples: int = 64) -> Findings:
        path = write_recipe(tmp_path / "recipe.yaml", values)
        return examine(load_recipe(path, overrides), path.name, processes, samples)

    return run


# ------------------------------------------------------------------------------------- memory
def real_bytes(model: Any) -> int:
    """Weights as they lie in memory, quantisation constants included."""
    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        state = vars(parameter).get("quant_state")
        if state is not None:
            total += sum(t.numel() * t.element_size() for t in (state.absmax, state.state2.absmax))
    return total


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("trainer.bf16=true",),
        FULL,
        ("model.mode=projector", "lora=null", "trainer.bf16=true"),
        ("model.mode=qlora",),
        ("model.dtype=bfloat16", "lora.train_projector=false"),
    ],
)
def test_weights_gradients_and_optimizer_states_are_exact(
    values: dict[str, Any], tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    if "model.mode=qlora" in overrides:
        pytest.importorskip("bitsandbytes")
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", values), overrides)
    model = build(recipe)
    quantised = four_bit_names(model) if recipe.mode == "qlora" else set()
    memory = estimate(model, Setup.of(recipe, 1), NOTHING, quantised)
    real = load_model(recipe, bf16=bool(recipe.trainer.get("bf16")))
    assert memory.weights == real_bytes(real)
    trained = [p for p in real.parameters() if p.requires_grad]
    assert memory.gradients == sum(p.numel() * p.element_size() for p in trained)
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [t for s in optimizer.state.values() for name, t in s.items() if name != "step"]
    assert memory.optimizer == sum(t.numel() * t.element_size() for t in states)


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "paged_adamw_32bit", "lion_8bit", "adafactor"])
def test_states_of_other_optimizers(name: str) -> None:
    weight = torch.nn.Parameter(torch.randn(96, 128))
    weight.grad = torch.ones_like(weight)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        optimizer: Any = Adafactor([weight])
    else:
        optim = pytest.importorskip("bitsandbytes").optim
        kinds = {"adamw_bnb_8bit": optim.AdamW8bit, "lion_8bit": optim.Lion8bit}
        optimizer = kinds.get(name, optim.AdamW)([weight])
    optimizer.step()
    state = optimizer.state[weight]
    tensors = [t for key, t in state.items() if isinstance(t, torch.Tensor) and "qmap" not in key]
    found = sum(t.numel() * t.element_size() for t in tensors if t.numel() > 1)
    assert state_bytes(name, weight, 4, embedding=False) == found


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
def test_activations_are_about_what_autograd_keeps(adapters: bool, bf16: bool) -> None:
    tokens, width = 64, 64
    text = LlamaConfig(
        hidden_size=width, intermediate_size=172, num_hidden_layers=1, num_attention_heads=4
    )
    vision = CLIPVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model: Any = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    if adapters:
        model = add_lora(model.bfloat16() if bf16 else model, LoraSection(r=2, alpha=4))
    family = find_family(base_of(model))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    stream = family.text_model.get_input_embeddings().weight.dtype
    hidden = torch.randn(1, tokens, width, dtype=stream, requires_grad=True)
    tables = family.text_model.rotary_emb(hidden, torch.arange(tokens)[None])
    weights |= {table.untyped_storage().data_ptr() for table in tables}
    held: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        return tensor

    layer = family.layers[0]
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        layer(hidden, position_embeddings=tables)
    stores = [tensor.untyped_storage() for tensor in held]
    kept = sum({s.data_ptr(): s.nbytes() for s in stores if s.data_ptr() not in weights}.values())
    size = 2 if bf16 else 4
    casts = sum(p.numel() for p in layer.parameters() if p.dim() == 2) * size
    kept -= casts if bf16 and not adapters else 0
    estimated = tokens * layer_bytes(family, layer, size, hidden.element_size())
    assert estimated == pytest.approx(kept, rel=0.15)


def test_sharding_divides_what_its_stage_says(values: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", values), FULL)
    model = build(recipe)

    def parts(**setup: Any) -> tuple[int, int, int]:
        memory = estimate(model, Setup(**setup), NOTHING, set())
        return memory.weights, memory.gradients, memory.optimizer

    weights, gradients, optimizer = parts()
    assert parts(processes=4) == (weights, 2 * gradients, optimizer)
    # DeepSpeed steps on fp32 copies: three numbers a weight, not two.
    whole = optimizer * 3 // 2
    zero = {"processes": 4, "deepspeed": True}
    assert parts(zero=1, **zero) == (weights, gradients, whole // 4)
    assert parts(zero=2, **zero) == (weights, gradients // 4, whole // 4)
    assert parts(zero=3, **zero) == (weights // 4, gradients // 4, whole // 4)
    assert parts(zero=3, processes=4) == (weights // 4, gradients // 4, optimizer // 4)
    memory = estimate(model, Setup(zero=3, offload_optimizer=True, **zero), NOTHING, set())
    assert (memory.optimizer, memory.offloaded) == (0, whole // 4)


def test_a_recipe_names_its_setup(doctor: Doctor, values: dict[str, Any], tmp_path: Path) -> None:
    values["trainer"]["deepspeed"] = "launch/deepspeed/zero3.json"
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", values), [])
    assert Setup.of(recipe, 2).zero == 3
    assert Setup.of(recipe, 1).zero == 0  # plain Python runs without it
    assert doctor(processes=2).memory != doctor().memory
    recipe.trainer["deepspeed"] = "none.json"
    with pytest.raises(ValueError, match="no such file: none"):
        Setup.of(recipe, 2)


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of LLaVA-1.5-7B."""
    folder = tmp_path_factory.mktemp("7b")
    LlavaConfig().save_pretrained(folder)
    return folder


def test_seven_billion_weights(seven_billion: Path, values: dict[str, Any], tmp_path: Path) -> None:
    """Totals everybody who trains this model knows; no weight is read or made."""
    values["model"]["path"] = str(seven_billion)
    values["lora"] = {"r": 128, "alpha": 256}
    values["trainer"] |= {"bf16": True, "gradient_checkpointing": True}
    path = write_recipe(tmp_path / "recipe.yaml", values)
    recipe = load_recipe(path, [])
    model = build(recipe)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 319_815_680
    load = Load(tokens_in=16 * 700, tokens=16 * 700, logits=16 * 60, patches=16 * 577)
    memory = estimate(model, Setup.of(recipe, 1), load, set())
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert memory.weights == 2 * frozen + 4 * trained
    assert 6.9e9 < frozen < 7.2e9
    assert memory.gradients + memory.optimizer == 12 * trained
    # One input of 4096 bf16 numbers a token and layer, and one layer whole.
    inputs = 16 * 700 * 32 * 4096 * 2
    assert inputs < memory.activations < 2.5 * inputs
    assert 20e9 < memory.total < 30e9
    open_ = estimate(model, Setup(bf16=True), load, set())
    assert open_.activations > 10 * memory.activations
    quantised = four_bit_names(model)
    four = estimate(model, Setup.of(recipe, 1), load, quantised)
    stored = (four_bit_bytes(p.numel()) for n, p in model.named_parameters() if n in quantised)
    assert 3.2e9 < sum(stored) < 3.5e9
    assert memory.weights - four.weights > 9e9


# --------------------------------------------------------------------------------------- data
def test_a_healthy_recipe(doctor: Doctor, values: dict[str, Any]) -> None:
    values["trainer"] |= {"num_train_epochs": 2, "gradient_accumulation_steps": 2}
    del values["trainer"]["max_steps"]
    found = doctor(PRUNED, "data.max_bad=0")
    assert found.starts, found.problems
    assert found.data is not None
    assert (found.data.total, found.data.asked, len(found.data.sizes)) == (24, 24, 24)
    assert {size.visual for size in found.data.sizes} == {0, 16}
    assert {size.patches for size in found.data.sizes} == {0, 16}
    assert "It is" in found.data.learnt
    assert "What colour" not in found.data.learnt
    (kept,) = found.budgets
    text = sum(size.text for size in found.data.sizes) / 24
    visual = sum(size.visual for size in found.data.sizes) / 24
    assert kept.dense == pytest.approx(text + visual)
    assert kept.average == pytest.approx(text + 0.4 * visual)
    assert kept.average < kept.enters < kept.dense
    assert found.batches is not None
    assert (found.batches.samples, found.batches.steps_per_epoch, found.batches.steps) == (4, 3, 6)
    assert found.memory is not None
    assert found.disk is not None
    dense = doctor().memory
    assert dense is not None
    assert dense.activations > found.memory.activations
    assert dense.head > found.memory.head  # logits at all positions


def test_every_budget_of_a_list_is_foretold(doctor: Doctor) -> None:
    found = doctor("prune.keep=[0.4, 0.2, 1.0]", samples=5)
    assert [kept.keep for kept in found.budgets] == [0.4, 0.2, 1.0]
    averages = [kept.average for kept in found.budgets]
    assert averages[1] < averages[0] < averages[2] == found.budgets[2].dense
    assert found.data is not None
    assert found.data.asked == 5
    assert doctor("prune.keep=null").budgets[0].keep is None


def test_batches_by_kept_tokens(doctor: Doctor) -> None:
    found = doctor(PRUNED, "data.max_tokens_per_batch=120")
    assert found.batches is not None
    assert found.batches.samples == pytest.approx(120 / found.budgets[0].average)
    assert found.batches.tokens == 120
    assert found.batches.largest.tokens <= 120


def test_bad_samples_are_counted_by_reason(
    doctor: Doctor, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "data/images"
    (images / "0.png").unlink()
    (images / "1.png").write_bytes(b"no picture")
    Image.new("RGB", (900, 900)).save(images / "2.png")
    monkeypatch.setattr("itprune.question.MAX_PIXELS", 500_000)
    found = doctor(PRUNED)
    assert found.data is not None
    assert dict(found.data.bad) == {
        "images missing": 1,
        "images unreadable": 1,
        "images too large": 1,
    }
    assert "record 0" in found.data.examples["images missing"]
    assert not found.starts
    assert "3 of 24 samples examined are bad (12%), but 1.0% are allowed" in found.problems[0]
    assert doctor(PRUNED, "data.max_bad=0.2").starts
    few = doctor(PRUNED, samples=8)  # one bad sample of some says little of all
    assert few.starts
    assert "1 of 8 samples examined" in few.warnings[0]


def test_long_samples_are_cut_or_left_out(doctor: Doctor) -> None:
    found = doctor("data.max_length=30", "data.max_bad=0.9")
    assert found.data is not None
    assert found.data.cut + found.data.bad["no supervised token left (data.max_length)"] > 0
    assert all(size.text + size.visual <= 30 for size in found.data.sizes)
    found = doctor("data.max_length=10", "data.max_bad=0.9")
    assert found.data is not None
    assert found.data.bad["too many image tokens (data.max_length)"] > 5
    roomy = doctor(PRUNED, "data.max_length=30", "data.max_bad=0.9").data  # images take less
    assert roomy is not None
    assert sum(roomy.bad.values()) <= sum(found.data.bad.values())


def test_a_stream_is_examined_from_its_beginning(
    doctor: Doctor, values: dict[str, Any], tmp_path: Path
) -> None:
    record = {
        "messages": [
            {"role": "user", "content": "What is it?"},
            {"role": "assistant", "content": "A thing."},
        ]
    }
    lines = tmp_path / "lines.jsonl"
    lines.write_text(f"{json.dumps(record)}\n" * 8)
    values["data"]["train"] = str(lines)
    found = doctor("data.streaming=true", "trainer.max_steps=7")
    assert found.starts, found.problems
    assert found.data is not None
    assert (found.data.total, found.data.asked) == (0, 8)
    assert found.batches is not None
    assert (found.batches.steps_per_epoch, found.batches.steps) == (None, 7)


# ----------------------------------------------------------------------------------- problems
def test_all_that_stands_against_a_run_is_told_at_once(
    doctor: Doctor, values: dict[str, Any], tmp_path: Path
) -> None:
    values["data"] |= {"train": str(tmp_path / "none.json"), "val": str(tmp_path / "no.json")}
    found = doctor()
    assert [problem.split(":")[0].rpartition("/")[2] for problem in found.problems] == [
        "none.json",
        "no.json",
    ]
    assert found.family == "llava"
    values["model"]["path"] = str(tmp_path)
    found = doctor()
    assert not found.starts
    assert all(problem.startswith("model.path") for problem in found.problems)


def test_an_output_folder_of_another_run(
    doctor: Doctor, values: dict[str, Any], tmp_path: Path
) -> None:
    from train.pruning import write_recipe as write_resolved

    recipe = load_recipe(write_recipe(tmp_path / "other.yaml", values), ["lora.r=2"])
    write_resolved(tmp_path / "run", recipe)
    (tmp_path / "run/model.safetensors").touch()
    found = doctor()
    assert "is of another run: lora.r was 2 and is 4" in found.problems[0]


def test_room_that_is_short_is_a_warning(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.doctor.room.shutil.disk_usage", lambda path: Free())
    monkeypatch.setattr("train.doctor.examine.device_memory", lambda cpu, processes: 1000)
    found = doctor("trainer.save_strategy=steps", "trainer.save_steps=1")
    assert found.starts
    assert found.disk is not None
    assert found.disk.checkpoints == 4
    disk, memory = found.warnings
    assert "trainer.save_total_limit" in disk
    assert "gradient_checkpointing" in memory


class Free:
    free = 1000


# -------------------------------------------------------------------------------- the command
def test_the_command(
    values: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(tmp_path / "recipe.yaml", values))
    assert main(["doctor", recipe, "--samples", "4", PRUNED]) == 0
    out = capfd.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    for part in (
        "family llava",
        "4 of 24 samples examined, 0 cannot be used",
        "| It is",
        "at keep 0.4",
        "memory    about",
        "verdict   the run would start",
    ):
        assert part in out
    assert not list(tmp_path.glob("run/*")), "it trained"


def test_a_recipe_that_cannot_be_read(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("launch_doctor", ROOT / "launch/doctor.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    recipe = str(write_recipe(tmp_path / "recipe.yaml", values))
    assert script.main([recipe, "prune.kepe=1"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "did you mean 'keep'" in err
    assert err.count("\n") == 1
    assert script.main([recipe, PRUNED, "--samples", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["starts"]
    assert found["data"]["examined"] == 2
    assert found["memory"]["total"] > found["memory"]["weights"] > 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "give either a recipe or --model"),
        (("a.yaml", "--model", "b"), "give either a recipe or --model"),
        (("none.yaml",), "no such recipe"),
        (("a.yaml", "--keep", "0.5"), "prune.keep="),
        (("--model", "b", "--samples", "5"), "--samples: does not go with --model"),
        (("pyproject.toml", "--samples", "0"), "at least 1"),
    ],
)
def test_options_that_do_not_go_together(
    words: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *words]) == 1
    assert reason in capsys.readouterr().err


def test_the_largest_family_parts_are_found(values: dict[str, Any], tmp_path: Path) -> None:
    """4 bits are for the decoder's linear layers alone, as mode qlora has them."""
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", values), ["model.mode=qlora"])
    model = build(recipe)
    names = four_bit_names(model)
    layers = len(find_family(model.get_base_model()).layers)
    assert len(names) == 7 * layers
    assert not any("lora" in name or "vision" in name or "lm_head" in name for name in names)
