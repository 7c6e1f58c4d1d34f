"""FastV and PyramidDrop inside the tiny Llama: the real engine on a LLaVA built around it.

The stored embeddings go in as they are: text rows become the embedding table, image rows come out
of the projector by a hook of ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from itprune import PruneConfig, attach
from itprune.attach import Attached
from itprune.trace import Trace
from tests.golden import Golden, case

SIDE = 12
"""Patches on a side of the image."""


@dataclass
class Ran:
    """One pruned forward."""

    attached: Attached
    trace: Trace
    last_hidden: Tensor
    """(D,) of the last token, behind the final norm."""


def _llava(data: dict[str, Tensor], golden: Golden) -> LlavaForConditionalGeneration:
    """The tiny Llama with an image in front of it, which only has to have the right size."""
    text = LlamaConfig.from_pretrained(golden.folder / "tiny_llama_8l")
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=4 * SIDE,
        patch_size=4,
    )
    rows = data["inputs_embeds"].shape[1]
    text.vocab_size = rows + 1
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=rows)
    model = LlavaForConditionalGeneration(config).eval()
    weights = load_file(golden.folder / "tiny_llama_8l" / "model.safetensors")
    weights["embed_tokens.weight"] = torch.cat([data["inputs_embeds"][0], torch.zeros(1, 64)])
    model.get_decoder().load_state_dict(weights)
    return model


def _run(data: dict[str, Tensor], golden: Golden, config: PruneConfig) -> Ran:
    before, image, _ = data["segments"].tolist()
    model = _llava(data, golden)
    rows = torch.arange(data["inputs_embeds"].shape[1])
    seen = slice(before, before + image)
    stored = data["inputs_embeds"][0, seen]
    # In front of the engine's own hook on the projector, which restores empty slots.
    model.model.multi_modal_projector.register_forward_hook(
        lambda module, args, output: stored.expand_as(output)
    )
    last: list[Tensor] = []
    model.get_decoder().norm.register_forward_hook(
        lambda module, args, output: last.append(output[0, -1])
    )
    ids = rows.clone()
    ids[seen] = model.config.image_token_id
    with attach(model, config) as attached, attached.tracing() as trace:
        model(
            input_ids=ids[None], pixel_values=torch.zeros(1, 3, 4 * SIDE, 4 * SIDE), use_cache=False
        )
        return Ran(attached, trace, last[-1])


@case("llm", "dense.last_hidden")
def dense(data: dict[str, Tensor], golden: Golden) -> Tensor:
    return _run(data, golden, PruneConfig("dense", keep=1.0)).last_hidden


@case("llm", "fastv.indices_K2_r50")
def fastv(data: dict[str, Tensor], golden: Golden) -> Tensor:
    options = {"layer": 1, "fraction": 0.5}
    ran = _run(data, golden, PruneConfig("fastv", options=options))
    return ran.trace.alive[2][ran.trace.visual].nonzero()[:, 0]


def _pyramid(data: dict[str, Tensor], golden: Golden) -> Ran:
    return _run(data, golden, PruneConfig("pyramiddrop", keep=None))


@case("llm", "pyramiddrop.last_hidden")
def pyramid_hidden(data: dict[str, Tensor], golden: Golden) -> Tensor:
    return _pyramid(data, golden).last_hidden


@case("llm", "pyramiddrop.lengths")
def pyramid_lengths(data: dict[str, Tensor], golden: Golden) -> Tensor:
    """Tokens in each hidden state: the input of every layer, then the last layer's output."""
    report = _pyramid(data, golden).attached.report
    assert report is not None
    starts = sorted(report.drops)
    at = [max(s for s in starts if s <= layer) for layer in range(report.depth)]
    return torch.tensor([report.drops[start][0] for start in (*at, at[-1])])
