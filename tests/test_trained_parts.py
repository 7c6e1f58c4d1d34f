"""Trained parts of a method: where they are, what saves them, what takes them away."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from itprune import PruneConfig, attach, register_method
from itprune.host import Host
from itprune.methods.base import Method, NoOptions
from itprune.ragged import top_per_group
from itprune.tokens import Images, Kept
from tests.models import batch, tiny_llava


@register_method("toy_scaled")
class Scaled(Method):
    """Keeps the first half of each image, its features through a linear layer."""

    places = ("before_llm",)

    def __init__(self, options: NoOptions, host: Host) -> None:
        super().__init__(options, host)
        self.scale = nn.Linear(host.vision_width, host.vision_width)

    def before_llm(self, images: Images) -> Kept:
        place = -torch.arange(len(images.features), dtype=torch.float32)
        keep = top_per_group(place, images.image, images.lens // 2)
        return Kept(keep, self.scale(images.features))


CONFIG = PruneConfig("toy_scaled", keep=0.5)


def test_a_plain_model_has_the_method_as_a_submodule() -> None:
    model = tiny_llava().train()
    with attach(model, CONFIG) as pruner:
        names = {name for name, _ in model.named_parameters() if name.startswith("pruner.")}
        assert names == {"pruner.scale.weight", "pruner.scale.bias"}
        assert pruner.method.training
        model.eval()
        assert not pruner.method.training
        model(**batch()).loss.backward()
        assert pruner.method.scale.weight.grad.abs().max() > 0
    assert not any("pruner" in name for name, _ in model.named_parameters())


def test_every_adapter_checkpoint_has_the_trained_parts(tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=r".*language_model.*\.v_proj")
    model = get_peft_model(tiny_llava(), lora).train()
    with attach(model, CONFIG) as pruner:
        own = [p for n, p in model.named_parameters() if "pruner" in n]
        assert len(own) == 2
        assert all(p.requires_grad for p in own)
        model(**batch()).loss.backward()
        torch.optim.SGD(own, lr=1.0).step()
        trained = pruner.method.scale.weight.detach().clone()
        model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.pruner.scale.weight"], trained)
    again = PeftModel.from_pretrained(tiny_llava(), str(tmp_path))  # without a pruner: no harm
    assert "pruner" in again.peft_config["default"].modules_to_save
    with attach(again, CONFIG) as pruner:
        again.load_adapter(str(tmp_path), "default")
        assert torch.equal(pruner.method.scale.weight, trained)


def test_an_adapter_is_merged_around_the_trained_parts() -> None:
    lora = LoraConfig(target_modules=r".*language_model.*\.v_proj", init_lora_weights=False)
    model, data = get_peft_model(tiny_llava(), lora).eval(), batch()
    with attach(model, CONFIG) as pruner, torch.no_grad():
        expected = model(**data).loss
        merged = model.merge_and_unload()
        assert merged.pruner is pruner.method
        assert (merged(**data).loss - expected).abs() < 1e-5
    assert "pruner" not in dict(merged.named_children())


def test_an_attach_that_fails_leaves_nothing_behind() -> None:
    model = tiny_llava()
    model.get_decoder().config._attn_implementation = "eager"
    try:
        attach(model, CONFIG)
    except ValueError:
        assert "pruner" not in dict(model.named_children())
    else:
        raise AssertionError("eager attention is not supported")


def test_trained_parts_have_the_models_type() -> None:
    model, data = tiny_llava().bfloat16(), batch()
    with attach(model, CONFIG) as pruner:
        assert pruner.method.scale.weight.dtype == torch.bfloat16
        assert model(**{**data, "pixel_values": data["pixel_values"].bfloat16()}).loss.isfinite()
