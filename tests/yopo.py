"""YOPO written out: a decoder with dense masks and every channel, row by row, without a cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from itprune import PromptFormat, PruneConfig, attach
from itprune.attach import Attached
from itprune.calibration import Calibration
from tests.models import ASSISTANT, IMAGE, PATCHES

PROMPT = PromptFormat((0, 1, 2, *ASSISTANT), ASSISTANT)
HEADS, CUT, SIDE = 4, 4, math.isqrt(PATCHES)
SCORES = [[9.0, 9.0, 9.0, 9.0]] * 2 + [
    [0.4, 0.1, 0.3, 0.2],
    [0.1, 0.9, 0.05, 0.35],
    [0.5, 0.01, 0.02, 0.03],
]
"""A calibration of all layers but the last. Layers 2 and 3 share two heads, of 0.9 and 0.4."""
ACTIVE = {2: [1, 0, 0, 0], 3: [0, 1, 0, 0], 4: [1, 0, 0, 0]}
SHARE = 10 / 16
OPTIONS = {
    "all": {"heads": SHARE},
    "window": {"heads": None, "ffn_keep": 1.0},
    "heads": {"heads": SHARE, "ffn_keep": 1.0, "window": None},
    "ffn": {"heads": None, "window": None},
}


@dataclass
class Plan:
    """What the reference computes."""

    mode: str = "remove"
    window: int | None = 3
    heads: float | None = SHARE
    ffn_keep: float = 0.5

    @property
    def options(self) -> dict[str, object]:
        return {**vars(self), "cut": CUT}


def attached(model: torch.nn.Module, plan: Plan, layout: str = "packed") -> Attached:
    config = PruneConfig("yopo", keep=None, options=plan.options, layout=layout)
    calibration = Calibration(samples=1, found={"heads": SCORES})
    return attach(model, config, prompt=PROMPT, calibration=calibration)


def decode(
    model: torch.nn.Module, ids: Tensor, pixels: Tensor | None, plan: Plan, new: int = 0
) -> Tensor:
    """(S, vocabulary) logits of one row without padding; NaN where a token was removed. The last
    `new` tokens were generated and are text, whatever their ids."""
    text = model.get_decoder()
    visual = (ids == IMAGE) & (torch.arange(len(ids)) < len(ids) - new)
    hidden = text.embed_tokens(ids)
    if pixels is not None and visual.any():
        features = torch.cat(list(model.model.get_image_features(pixels).pooler_output))
        hidden = torch.zeros_like(hidden).index_copy(0, visual.nonzero()[:, 0], features) + (
            hidden * ~visual[:, None]
        )
    place = torch.arange(len(ids))
    seen = allowed(visual, plan.window)
    for index, layer in enumerate(text.layers):
        if index == CUT and plan.mode == "remove":
            hidden, place, seen = hidden[~visual], place[~visual], seen[~visual][:, ~visual]
            visual = visual[~visual]
        hidden = hidden + attention(text, layer, index, hidden, place, seen, visual, plan)
        normed = layer.post_attention_layernorm(hidden)
        channels = layer.mlp.act_fn(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
        first = torch.arange(channels.shape[1]) < int(channels.shape[1] * plan.ffn_keep)
        hidden = hidden + layer.mlp.down_proj(channels * (first | ~visual[:, None]))
    logits = model.lm_head(text.norm(hidden))
    return logits.new_full((len(ids), logits.shape[1]), math.nan).index_copy(0, place, logits)


def attention(text, layer, index, hidden, place, seen, visual, plan) -> Tensor:
    module, normed = layer.self_attn, layer.input_layernorm(hidden)
    q, k, v = (
        f(normed).view(1, len(hidden), -1, module.head_dim).transpose(1, 2)
        for f in (module.q_proj, module.k_proj, module.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *text.rotary_emb(hidden[None], place[None]))
    k, v = (t[0].repeat_interleave(HEADS // t.shape[1], 0) for t in (k, v))
    heads = torch.ones(HEADS, dtype=torch.bool)
    if plan.heads is not None and index in ACTIVE:
        heads = torch.tensor(ACTIVE[index]).bool()
    treats = (heads & torch.tensor(index < CUT))[:, None, None] | ~visual
    logits = q[0] @ k.transpose(1, 2) * module.scaling
    if plan.mode == "remove":
        weight = logits.masked_fill(~(seen & treats), -1e30).softmax(-1)
    else:
        weight = logits.masked_fill(~seen, -math.inf).softmax(-1) * treats
    out = weight @ v * (heads[:, None] | ~visual)[..., None]
    return module.o_proj(out.transpose(0, 1).flatten(1))


def allowed(visual: Tensor, window: int | None) -> Tensor:
    """Causal, but inside an image a window in both directions."""
    causal = torch.ones(len(visual), len(visual), dtype=torch.bool).tril()
    if window is None:
        return causal
    number = visual.cumsum(0) - 1
    image = torch.where(visual, number // PATCHES, -1)
    row, column = number % PATCHES // SIDE, number % SIDE
    reach = window // 2
    near = ((row[:, None] - row).abs() <= reach) & ((column[:, None] - column).abs() <= reach)
    inside = (image[:, None] == image) & visual[:, None]
    return torch.where(inside, near, causal)


def rows_of(data: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """(place of the row's tokens, ids, pixels) of each row of a batch."""
    images = 0
    for ids, mask in zip(data["input_ids"], data["attention_mask"].bool(), strict=True):
        count = int((ids == IMAGE).sum()) // PATCHES
        yield mask, ids[mask], data["pixel_values"][images : images + count] if count else None
        images += count


def reference(model: torch.nn.Module, data: dict[str, Tensor], plan: Plan) -> tuple[Tensor, Tensor]:
    """(B, S, vocabulary) logits, NaN where there are none, and the loss."""
    logits = torch.full((*data["input_ids"].shape, model.lm_head.out_features), math.nan)
    total, count = torch.zeros(()), 0
    for index, (mask, ids, pixels) in enumerate(rows_of(data)):
        out = decode(model, ids, pixels, plan)
        logits[index, mask] = out.detach()
        targets = data["labels"][index, mask][1:]
        total = total + F.cross_entropy(
            out[:-1][targets != -100], targets[targets != -100], reduction="sum"
        )
        count += int((targets != -100).sum())
    return logits, total / count


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
