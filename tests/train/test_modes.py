"""What trains in each mode, and what a bad base model says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.helpers import recipe_values, write_recipe
from train.blank import BlankImage
from train.model import check_trains, load_model, load_processor, trains_images
from train.recipe.config import Recipe, load_recipe


@pytest.fixture
def make(tiny_llava_folder: Path, tmp_path: Path) -> Any:
    def build(**sections: Any) -> Recipe:
        values = recipe_values(tiny_llava_folder, tmp_path / "d.json", tmp_path / "out")
        for name, section in sections.items():
            values[name] = None if section is None else {**(values.get(name) or {}), **section}
        return load_recipe(write_recipe(tmp_path / "r.yaml", values))

    return build


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_lora_trains_adapters_of_the_language_model_only(make: Any) -> None:
    model = load_model(make(lora={"train_projector": False}), bf16=False)
    names = trained(model)
    assert names
    assert all("language_model" in n and ".lora_" in n for n in names)
    assert len(names) == 4 * 7 * 2
    assert not trains_images(model)


def test_lora_with_the_projector(make: Any) -> None:
    model = load_model(make(), bf16=False)
    others = {n for n in trained(model) if ".lora_" not in n}
    assert len(others) == 4
    assert all("multi_modal_projector.modules_to_save" in n for n in others)
    assert trains_images(model)


def test_projector_mode_trains_nothing_else(make: Any) -> None:
    model = load_model(make(model={"mode": "projector"}, lora=None), bf16=True)
    parts = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
    assert trained(model) == {f"model.multi_modal_projector.{part}" for part in parts}
    types = {n: p.dtype for n, p in model.named_parameters()}
    assert types["model.multi_modal_projector.linear_1.weight"] == torch.float32
    assert types["lm_head.weight"] == torch.bfloat16


def test_full_mode_freezes_the_named_parts(make: Any) -> None:
    names = trained(load_model(make(lora=None), bf16=True))
    assert "lm_head.weight" in names
    assert any("multi_modal_projector" in n for n in names)
    assert not any("vision_tower" in n for n in names)
    names = trained(load_model(make(lora=None, model={"freeze": ["projector", "language"]}), False))
    assert names
    assert all("vision_tower" in n for n in names)
    everything = ["projector", "language", "vision"]
    model = load_model(make(lora=None, model={"freeze": everything}), False)
    with pytest.raises(ValueError, match="nothing would train"):
        check_trains(model)


def test_a_blank_image_lets_text_reach_every_trained_weight(make: Any) -> None:
    recipe = make()
    processor = load_processor(recipe.model.path)
    model = load_model(recipe, bf16=False)
    batch = dict(processor(text=["USER: What is 1? ASSISTANT: One."], return_tensors="pt"))
    plain = model(**batch, labels=batch["input_ids"]).loss
    BlankImage(model)
    blank = model(**batch, labels=batch["input_ids"]).loss
    blank.backward()
    assert torch.equal(plain, blank)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert not any(gradient is None for gradient in gradients.values())
    projector = [g for n, g in gradients.items() if "projector" in n and g is not None]
    assert not any(gradient.any() for gradient in projector)


def test_a_wrong_base_model_is_one_sentence(
    make: Any, tiny_llava_folder: Path, tmp_path: Path
) -> None:
    recipe = make(model={"path": str(tmp_path / "nowhere")})
    for load in (lambda: load_model(recipe, False), lambda: load_processor(recipe.model.path)):
        with pytest.raises(ValueError, match=r"model.path: ") as caught:
            load()
        assert "\n" not in str(caught.value)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llava_folder, broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.path: "):
        load_model(make(model={"path": str(broken)}), False)


def test_a_layer_name_that_matches_nothing(make: Any) -> None:
    with pytest.raises(ValueError, match=r"^lora: "):
        load_model(make(lora={"target": ["c_attn"]}), False)
