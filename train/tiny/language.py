"""Stages 2 and 3: alignment on captions, then instruction tuning, on a frozen tower.

The small language model has no public predecessor, so it is trained from nothing in the
alignment stage together with the projector: first on pictures reduced to a few patches, where
looking things up is easiest to learn, then on all of them.

Shapes: B rows, T tokens, N patches, A supervised tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from train.scenes.questions import BASE, Dialogue, Kind, scene_items
from train.scenes.render import COLOUR_NAMES, Scenes, draw_scenes, sample_scenes
from train.tiny.captions import CAPTIONS, COLUMN_WORDS, ROW_WORDS
from train.tiny.rows import PATCHES, RowBuilder, Rows
from train.tiny.tower import DIGITS, Targets, class_attention, rate_at, targets, to_pixels


@dataclass
class Phase:
    """One stretch of training with fixed ingredients."""

    name: str
    steps: int
    rate: float
    kinds: dict[str, float] = field(default_factory=dict)
    """Question and caption kinds with their shares."""
    batch: int = 32
    branches: int = 10
    patches: tuple[int, int] = (PATCHES, PATCHES)
    """Fewest and most patches a batch shows: inked ones first, then random others."""
    by_attention: float = 0.0
    """Share of batches that show the patches the class token attends to most, as a pruner does."""
    digits: tuple[int, int] = (2, 6)
    align: tuple[float, float] = (0.0, 0.0)
    """Weights of the terms that draw projected patches to the embeddings of their words: of what
    they show, and of where they are."""


@dataclass
class LanguageRecipe:
    """The body's size."""

    width: int = 192
    layers: int = 4
    heads: int = 4
    middle: int = 512
    rope_theta: float = 1e5
    echo: float = 1.0
    """How far key weights start as a copy of query weights (1: equal contents attend)."""


def build_model(
    recipe: LanguageRecipe, vision: CLIPVisionConfig, tokenizer: PreTrainedTokenizerFast
) -> LlavaForConditionalGeneration:
    """An untrained LLaVA around the given tower configuration."""
    text = LlamaConfig(
        vocab_size=len(tokenizer) + (-len(tokenizer)) % 64,
        hidden_size=recipe.width,
        intermediate_size=recipe.middle,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager")
    body = model.model.language_model
    with torch.no_grad():
        nn.init.normal_(body.embed_tokens.weight, std=0.05)
        model.lm_head.weight.copy_(body.embed_tokens.weight)
        for layer in body.layers:
            query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
            for weight in (query, key):
                nn.init.normal_(weight, std=recipe.width**-0.5)
            key.copy_(recipe.echo * query + (1 - recipe.echo**2) ** 0.5 * key)
    return model


def choose_dialogues(
    scenes: Scenes, kinds: dict[str, float], branches: int, rng: np.random.Generator
) -> list[list[Dialogue]]:
    """Conversations for every scene, drawn by the kinds' shares."""
    table: dict[str, Kind] = {**BASE, **CAPTIONS}
    names = list(kinds)
    share = np.array([kinds[name] for name in names])
    rows = []
    for index in range(len(scenes)):
        items = scene_items(scenes, index)
        row: list[Dialogue] = []
        for choice in rng.choice(len(names), 3 * branches, p=share / share.sum()):
            dialogue = table[names[choice]](items, rng)
            if dialogue and len(row) < branches:
                row.append(dialogue)
        rows.append(row)
    return rows


def choose_patches(ink: np.ndarray, limits: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """(B, N) patches to show: the inked ones first, then random others, in picture order."""
    flat = ink.reshape(len(ink), -1)
    number = int(rng.integers(limits[0], limits[1] + 1))
    if number >= PATCHES:
        return torch.arange(PATCHES).expand(len(flat), -1)
    wish = np.where(flat > 0.15, 1.0, 0.0) + rng.random(flat.shape)
    return torch.from_numpy(np.sort((-wish).argsort(1)[:, :number], 1))


def read_patches(model: LlavaForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What the projector gets from the frozen tower (B, 144, D), and the class token's attention.

    The attention (B, 144) is that of the block that gives the features.
    """
    tower = model.model.vision_tower
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        attention = class_attention(tower, states[-3], -2)
    return states[-2][:, 1:], attention


def row_logits(model: LlavaForConditionalGeneration, rows: Rows, projected: Tensor) -> Tensor:
    """(A, V) predictions at the supervised places."""
    body = model.model.language_model
    words = body.embed_tokens(rows.ids)
    shown = projected.gather(1, rows.picture[..., None].expand(-1, -1, projected.shape[-1]))
    end = rows.start + shown.shape[1]
    inputs = torch.cat([words[:, : rows.start], shown.to(words.dtype), words[:, end:]], 1)
    hidden = body(
        inputs_embeds=inputs,
        attention_mask=rows.mask.bfloat16(),
        position_ids=rows.positions,
        use_cache=False,
    ).last_hidden_state
    logits: Tensor = model.lm_head(hidden[rows.where[:, 0], rows.where[:, 1]])
    return logits.float()


class WordTargets:
    """The words a projected patch should lie near.

    Those of its digit, colour, row and column, and "one" in the middle of a cell against "many"
    around it, so that a digit of several patches can be counted once.
    """

    def __init__(self, builder: RowBuilder) -> None:
        middle = ("many", "one")
        vocabularies = (map(str, range(10)), COLOUR_NAMES, ROW_WORDS, COLUMN_WORDS, middle)
        self.words = [
            torch.tensor([builder.encode(f" {word}")[0] for word in words])
            for words in vocabularies
        ]
        patch = torch.arange(PATCHES)
        row, column = patch // 12, patch % 12
        middle_patch = (row % 3 == 1) & (column % 3 == 1)
        self.places = (row // 3, column // 3, middle_patch.long())

    def loss(
        self, model: LlavaForConditionalGeneration, projected: Tensor, want: Targets
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of inked patches against the words of content and those of place."""
        table = model.model.language_model.embed_tokens.weight
        inked = (want.digit >= 0) & (want.digit < DIGITS)
        places = (of.expand_as(want.digit) for of in self.places)
        losses = []
        for words, label in zip(self.words, (want.digit, want.hue, *places), strict=True):
            scores = projected[inked].float() @ table[words].float().T
            losses.append(F.cross_entropy(scores, label[inked]))
        return torch.stack(losses[:2]).sum(), torch.stack(losses[2:]).sum()


def train_phase(
    model: LlavaForConditionalGeneration,
    builder: RowBuilder,
    phase: Phase,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Train projector and body for one phase; the tower stays frozen."""
    rng = np.random.default_rng(seed)
    weights = [
        *model.model.multi_modal_projector.parameters(),
        *model.model.language_model.parameters(),
        *model.lm_head.parameters(),
    ]
    optimizer = torch.optim.AdamW(weights, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    words = WordTargets(builder)
    meter = Meter()
    began = time.time()
    for step in range(phase.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, phase.steps, phase.rate, min(100, phase.steps // 3))
        scenes = sample_scenes(rng, phase.batch, "train", phase.digits)
        pictures, ink = draw_scenes(rng, scenes, "train")
        dialogues = choose_dialogues(scenes, phase.kinds, phase.branches, rng)
        with torch.autocast("cpu", torch.bfloat16):
            read, attention = read_patches(model, to_pixels(pictures))
        kept = choose_patches(ink, phase.patches, rng)
        if phase.by_attention and rng.random() < phase.by_attention:
            kept = attention.topk(kept.shape[1]).indices.sort(1).values
        rows = builder.rows(dialogues, kept)
        with torch.autocast("cpu", torch.bfloat16):
            projected = model.model.multi_modal_projector(read)
            logits = row_logits(model, rows, projected)
        loss = F.cross_entropy(logits, rows.answer)
        total = loss
        if any(phase.align):
            content, place = words.loss(model, projected, targets(scenes, ink))
            total = loss + phase.align[0] * content + phase.align[1] * place
        optimizer.zero_grad()
        torch.autograd.backward(total)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        meter.add(dialogues, rows, logits.detach())
        if step % 50 == 49:
            figures = f"loss {float(loss.detach()):.3f} {meter.read()}"
            say(f"{phase.name} {step + 1:5d} {figures} {time.time() - began:.0f} s")


class Meter:
    """Accuracy by kind since the last reading, with the right history before every token."""

    def __init__(self) -> None:
        self.right: dict[str, list[float]] = {}

    def add(self, dialogues: list[list[Dialogue]], rows: Rows, logits: Tensor) -> None:
        """Count a batch. Captions count only the word each first word decides."""
        hit = (logits.argmax(-1) == rows.answer).tolist()
        at = 0
        for row in dialogues:
            for dialogue in row:
                for number, (_, answer) in enumerate(dialogue.turns):
                    words = len(answer.replace(",", " ,").split()) + 1
                    span = hit[at : at + words]
                    at += words
                    listed = 4 if dialogue.kind == "place_last" else 3
                    looked_up = dialogue.kind.endswith(("_first", "_last"))
                    counted = span[listed - 2 :: listed] if looked_up else span[:-1:2]
                    name = dialogue.kind if number == 0 else f"{dialogue.kind}+"
                    self.right.setdefault(name, []).extend(counted)
        if at != len(hit):
            raise ValueError(f"counted {at} answer tokens of {len(hit)}; a word is split")

    def read(self) -> str:
        """The figures as text; starts anew."""
        shown = "  ".join(
            f"{name} {np.mean(hits):.2f}" for name, hits in sorted(self.right.items())
        )
        self.right = {}
        return shown
