"""Tiny models of every family, from their configurations alone."""

from __future__ import annotations

import transformers as hf

from tests.models import DEPTH, PAD

VOCAB, IMAGE, VIDEO, BEGIN, END, MARKS = 300, 290, 291, 280, 281, 282
SIDE, PATCH = 24, 4
"""Of a square image: 36 patches."""

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
QWEN_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "num_heads": 4,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
}
TILINGS = [[24, 48], [48, 24], [48, 48]]


def _rope() -> dict[str, object]:
    return {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


# ---------------------------------------------------------------------------------- models
def llava(text: dict) -> hf.PreTrainedModel:
    vision = hf.CLIPVisionConfig(**VISION)
    config = hf.LlavaConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**text), image_token_id=IMAGE
    )
    return hf.LlavaForConditionalGeneration(config)


def llava_next(text: dict) -> hf.PreTrainedModel:
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**text),
        image_token_id=IMAGE,
        image_grid_pinpoints=TILINGS,
    )
    return hf.LlavaNextForConditionalGeneration(config)


def llava_onevision(text: dict) -> hf.PreTrainedModel:
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=hf.Qwen2Config(**text),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=TILINGS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",  # two by two tiles are shrunk to the size of two
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


def qwen2_vl(text: dict) -> hf.PreTrainedModel:
    config = hf.Qwen2VLConfig(
        vision_config={**QWEN_VISION, "embed_dim": 32, "mlp_ratio": 2},
        text_config={**text, "rope_parameters": _rope()},
        **QWEN_TOKENS,
    )
    return hf.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl(text: dict) -> hf.PreTrainedModel:
    config = hf.Qwen2_5_VLConfig(
        vision_config={
            **QWEN_VISION,
            "intermediate_size": 64,
            "out_hidden_size": 32,
            "window_size": 16,  # two by two merged patches
            "fullatt_block_indexes": [1],
        },
        text_config={**text, "rope_parameters": _rope()},
        **QWEN_TOKENS,
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl(text: dict) -> hf.PreTrainedModel:
    config = hf.Qwen3VLConfig(
        vision_config={
            **QWEN_VISION,
            "intermediate_size": 64,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={**text, "head_dim": 8, "rope_parameters": _rope()},
        **QWEN_TOKENS,
    )
    return hf.Qwen3VLForConditionalGeneration(config)


def internvl(text: dict) -> hf.PreTrainedModel:
    vision = {**VISION, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
    config = hf.InternVLConfig(
        vision_config=vision,
        text_config=hf.Qwen2Config(**text),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return hf.InternVLForConditionalGeneration(config)


def idefics3(text: dict) -> hf.PreTrainedModel:
    config = hf.Idefics3Config(
        vision_config=dict(VISION),
        text_config=hf.LlamaConfig(**text),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return hf.Idefics3ForConditionalGeneration(config)


def smolvlm(text: dict) -> hf.PreTrainedModel:
    config = hf.SmolVLMConfig(
        vision_config=dict(VISION),
        text_config=hf.LlamaConfig(**text),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return hf.SmolVLMForConditionalGeneration(config)


def gemma3(text: dict) -> hf.PreTrainedModel:
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config={
            **text,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 12,
            "layer_types": layers * 2,
        },
        image_token_id=IMAGE,
        mm_tokens_per_image=9,
        boi_token_id=BEGIN,
        eoi_token_id=END,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def _paligemma(text: hf.PreTrainedConfig) -> hf.PreTrainedModel:
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=text,
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        vocab_size=VOCAB,
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def paligemma(text: dict) -> hf.PreTrainedModel:
    return _paligemma(hf.GemmaConfig(**text, head_dim=8))


def paligemma_2(text: dict) -> hf.PreTrainedModel:
    """Its scores are capped, so that the language model runs no kernel but the eager one."""
    config = hf.Gemma2Config(
        **text,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention"] * 3,
    )
    return _paligemma(config)
