"""`Images` made by hand from a CLIP vision tower, without the engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from itprune.methods import build_method
from itprune.methods.base import Host, Method
from itprune.tokens import Block, Images


def tiny_tower(seed: int = 0, size: int = 24, blocks: int = 6) -> CLIPVisionModel:
    """A random tower with (size / 4)^2 patches whose attention is far from flat."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        image_size=size,
        patch_size=4,
    )
    tower = CLIPVisionModel(config)
    generator = torch.Generator().manual_seed(seed)
    for weight in tower.parameters():
        if weight.ndim >= 2:
            scale = 1.2 / weight[0].numel() ** 0.5
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return tower.eval()


def host_of(tower: CLIPVisionModel, **changes: object) -> Host:
    """The tower in a LLaVA whose features are the output of the last block but one."""
    config = tower.config
    side = config.image_size // config.patch_size
    host = replace(
        Host.example(),
        vision_blocks=config.num_hidden_layers,
        vision_width=config.hidden_size,
        vision_heads=config.num_attention_heads,
        feature_block=config.num_hidden_layers - 2,
        grid=(side, side),
    )
    return replace(host, **changes)  # type: ignore[arg-type]


def images_of(tower: CLIPVisionModel, pixels: Tensor, cls_in_features: bool = False) -> Images:
    """What a method would be handed for these (n, 3, H, W) pixels."""
    config, seen = tower.config, {}

    def note(key: tuple[int, str]) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: object) -> None:
            seen[key] = output[0] if isinstance(output, tuple) else output

        return hook

    (layers,) = (m.layers for m in tower.modules() if type(m).__name__ == "CLIPEncoder")
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            parts = {"hidden": layer, "q": layer.self_attn.q_proj, "k": layer.self_attn.k_proj}
            for name, part in parts.items():
                handle = part.register_forward_hook(note((index, name)))
                stack.callback(handle.remove)
        tower(pixels)

    def heads(index: int, name: str) -> Tensor:
        flat = seen[index, name].detach()
        split = flat.view(*flat.shape[:2], config.num_attention_heads, -1)
        return split.transpose(1, 2)

    def block(index: int) -> Block:
        scale = layers[index].self_attn.scale
        return Block(heads(index, "q"), heads(index, "k"), scale, seen[index, "hidden"].detach())

    last, count = config.num_hidden_layers - 2, len(pixels)
    features = seen[last, "hidden"].detach()[:, 0 if cls_in_features else 1 :]
    lens = torch.full((count,), features.shape[1])
    side = config.image_size // config.patch_size
    return Images(
        features=features.flatten(0, 1),
        lens=lens,
        pixels=pixels,
        slots=lens,
        grid=torch.full((count, 2), side),
        slot_grid=torch.full((count, 2), side),
        sample=torch.arange(count),
        feature_block=last,
        has_cls=True,
        block=block,
        projected=lambda: features.flatten(0, 1),
        question=_absent,
        instruction=_absent,
    )


def _absent() -> Tensor:
    raise AssertionError("a method that needs no question asked for it")


def method_of(
    tower: CLIPVisionModel, name: str, keep: float | None = None, **options: object
) -> Method:
    """A method for this tower, at a target."""
    method = build_method(name, options, host_of(tower))
    method.share(keep)
    return method
