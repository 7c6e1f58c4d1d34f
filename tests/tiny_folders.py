"""Tiny random models of every family as ordinary Hugging Face folders, with their real processors.

Made from nothing, without a network. Each family has the sort of chat template its models come
with: one names no generation prompt, one writes a system turn of its own, one refuses turns that do
not alternate, one has none at all. Processors with a part for videos need torchvision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from tests.tiny_templates import CHATML, INSTRUCT, TURNS, UTTERANCES, tokenizer

SIDE, PATCH = 56, 14
"""Pixels of a tile's and of a patch's edge: 4 x 4 patches."""
PINPOINTS = [[56, 112], [112, 56], [112, 112]]


@dataclass(frozen=True)
class Maker:
    """How a family's processor and model are made."""

    processor: Callable[[], Any]
    config: Callable[[Any], hf.PreTrainedConfig]
    """Of a model that fits the processor."""


def build_folder(name: str, folder: Path, seed: int = 0) -> Path:
    """Writes model and processor of a family to `folder`; a test that cannot have it is skipped."""
    try:
        processor = MAKERS[name].processor()
    except ImportError as error:
        pytest.skip(f"{name}: {str(error).strip().partition(' but ')[0]}")
    build_model(name, processor, seed).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def build_model(name: str, processor: Any, seed: int = 0) -> Any:
    """A random float32 model with weights so wide that pictures and words change its answers."""
    torch.manual_seed(seed)
    model = hf.AutoModelForImageTextToText.from_config(MAKERS[name].config(processor))
    draw = torch.Generator().manual_seed(seed + 1)
    for key, weight in model.named_parameters():
        if weight.ndim >= 2:
            width = 0.7 if "embed" in key else 0.6 / weight.shape[-1] ** 0.5
            weight.data.copy_(torch.randn(weight.shape, generator=draw) * width)
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return model.eval()


# --------------------------------------------------------------------------------- decoders
def text(processor: Any, **changes: Any) -> dict[str, Any]:
    """Options of a decoder of 4 layers that all families share."""
    words = processor.tokenizer
    return {
        "vocab_size": len(words) + (-len(words)) % 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        **changes,
    }


TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
SQUARE = {"height": SIDE, "width": SIDE}


# ------------------------------------------------------------------------------------ LLaVA
def next_processor() -> Any:
    return hf.LlavaNextProcessor(
        hf.LlavaNextImageProcessor(
            size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer(image_token="<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=INSTRUCT,
    )


def next_config(processor: Any) -> hf.PreTrainedConfig:
    return hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER),
        text_config=hf.LlamaConfig(**text(processor)),
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=PINPOINTS,
    )


def onevision_processor() -> Any:
    return hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS),
        tokenizer("<|im_start|>", "<|im_end|>", image_token="<image>", video_token="<video>"),
        hf.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("IMAGE", "<image>").replace("VIDEO", "<video>"),
    )


def onevision_config(processor: Any) -> hf.PreTrainedConfig:
    return hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=hf.Qwen2Config(**text(processor)),
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


# ------------------------------------------------------------------------------------- Qwen
QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
QWEN_TOWER = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
}


def qwen_processor(processor: str, video: str) -> Callable[[], Any]:
    def make() -> Any:
        size = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
        around = "<|vision_start|>{}<|vision_end|>"
        template = CHATML.replace("IMAGE", around.format("<|image_pad|>"))
        return getattr(hf, processor)(
            hf.Qwen2VLImageProcessor(size=size, patch_size=PATCH, merge_size=2),
            tokenizer("<|im_start|>", "<|im_end|>", **QWEN_TOKENS),
            getattr(hf, video)(size=size, patch_size=PATCH, merge_size=2),
            chat_template=template.replace("VIDEO", around.format("<|video_pad|>")),
        )

    return make


def qwen_config(config: str, **tower: Any) -> Callable[[Any], hf.PreTrainedConfig]:
    def make(processor: Any) -> hf.PreTrainedConfig:
        ids = {
            name: processor.tokenizer.convert_tokens_to_ids(t) for name, t in QWEN_TOKENS.items()
        }
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        return getattr(hf, config)(
            vision_config={**QWEN_TOWER, **tower},
            text_config=text(processor, rope_parameters=rope),
            **{f"{name}_id": number for name, number in ids.items()},
        )

    return make


# --------------------------------------------------------------------------------- InternVL
def internvl_processor() -> Any:
    return hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size=SQUARE, min_patches=1, max_patches=4),
        tokenizer(
            "<|im_start|>",
            "<|im_end|>",
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        ),
        hf.InternVLVideoProcessor(size=SQUARE),
        image_seq_length=4,
        chat_template=CHATML.replace("IMAGE", "<IMG_CONTEXT>\n").replace("VIDEO", "<video>\n"),
    )


def internvl_config(processor: Any) -> hf.PreTrainedConfig:
    tower = {**TOWER, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
    return hf.InternVLConfig(
        vision_config=tower,
        text_config=hf.Qwen2Config(**text(processor)),
        image_token_id=processor.image_token_id,
        tie_word_embeddings=False,
    )


# ------------------------------------------------------------------------ Idefics3, SmolVLM
TILE_MARKERS = (
    "<end_of_utterance>",
    *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
)
TILE_TOKENS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
}
TILES = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}


def idefics3_processor() -> Any:
    return hf.Idefics3Processor(
        hf.Idefics3ImageProcessor(**TILES),
        tokenizer(*TILE_MARKERS, **TILE_TOKENS),
        image_seq_len=4,
        chat_template=UTTERANCES,
    )


def smolvlm_processor() -> Any:
    return hf.SmolVLMProcessor(
        hf.SmolVLMImageProcessor(**TILES),
        tokenizer(*TILE_MARKERS, video_token="<video>", **TILE_TOKENS),
        hf.SmolVLMVideoProcessor(**TILES),
        image_seq_len=4,
        chat_template=UTTERANCES,
    )


def tiles_config(config: str) -> Callable[[Any], hf.PreTrainedConfig]:
    def make(processor: Any) -> hf.PreTrainedConfig:
        return getattr(hf, config)(
            vision_config=dict(TOWER),
            text_config=hf.LlamaConfig(**text(processor)),
            image_token_id=processor.image_token_id,
            scale_factor=2,
        )

    return make


# ------------------------------------------------------------------------------------ Gemma
def gemma3_processor() -> Any:
    return hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(size=SQUARE),
        tokenizer(
            "<start_of_turn>",
            "<end_of_turn>",
            boi_token="<start_of_image>",
            eoi_token="<end_of_image>",
            image_token="<image_soft_token>",
        ),
        image_seq_length=4,
        chat_template=TURNS,
    )


def gemma3_config(processor: Any) -> hf.PreTrainedConfig:
    words = processor.tokenizer
    kinds = ["sliding_attention", "full_attention"]
    return hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=text(
            processor, query_pre_attn_scalar=8, sliding_window=24, layer_types=kinds * 2
        ),
        mm_tokens_per_image=4,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
        image_token_index=words.image_token_id,
        tie_word_embeddings=False,  # tied, random weights say the same token again and again
    )


def paligemma_processor() -> Any:
    pixels = hf.SiglipImageProcessor(size=SQUARE)
    pixels.image_seq_length = 16
    return hf.PaliGemmaProcessor(pixels, tokenizer(image_token="<image>"))


def paligemma_config(processor: Any) -> hf.PreTrainedConfig:
    return hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER, projection_dim=32, vision_use_head=False),
        text_config=hf.GemmaConfig(**text(processor)),
        image_token_index=processor.image_token_id,
        projection_dim=32,
        tie_word_embeddings=False,
    )


MAKERS = {
    "llava_next": Maker(next_processor, next_config),
    "llava_onevision": Maker(onevision_processor, onevision_config),
    "qwen2_vl": Maker(
        qwen_processor("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
        qwen_config("Qwen2VLConfig", embed_dim=32, mlp_ratio=2),
    ),
    "qwen2_5_vl": Maker(
        qwen_processor("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
        qwen_config("Qwen2_5_VLConfig", window_size=56, fullatt_block_indexes=[1]),
    ),
    "qwen3_vl": Maker(
        qwen_processor("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
        qwen_config("Qwen3VLConfig", num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
    ),
    "internvl": Maker(internvl_processor, internvl_config),
    "idefics3": Maker(idefics3_processor, tiles_config("Idefics3Config")),
    "smolvlm": Maker(smolvlm_processor, tiles_config("SmolVLMConfig")),
    "gemma3": Maker(gemma3_processor, gemma3_config),
    "paligemma": Maker(paligemma_processor, paligemma_config),
}
