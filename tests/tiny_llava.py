"""A tiny random LLaVA as an ordinary Hugging Face folder: tower with CLS, projector, Llama body.

Made from nothing in about a second, without a network. Two chat templates: one that marks and ends
the assistant turns, and one that does neither, like the stock LLaVA-1.5 files.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

MARKED = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}ASSISTANT: {% generation %}"
    "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ 'USER: ' if m['role'] == 'user' }}"
    "{% for c in m['content'] %}{{ '<image>\n' if c['type'] == 'image' else c['text'] }}"
    "{% endfor %}{{ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' if m['role'] != 'system' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CORPUS = [
    "USER: What colour is the square? ASSISTANT: The square is red.",
    "SYSTEM: Which shape is on the left? The circle. green blue yellow 0 1 2 3 4 5 6 7 8 9",
]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 480 tokens that knows `<image>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=512,
    )


def build_processor(
    template: str = MARKED, image_size: int = 56, patch: int = 14
) -> LlavaProcessor:
    """The processor; an image becomes (image_size / patch)^2 tokens."""
    square = {"height": image_size, "width": image_size}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=square),
        tokenizer=build_tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def build_model(processor: LlavaProcessor, seed: int = 0, layers: int = 4) -> torch.nn.Module:
    """A random model that fits the processor, float32, about 0.25 M parameters."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    size = processor.image_processor.crop_size["height"]
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=size,
        patch_size=processor.patch_size,
        projection_dim=32,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer) + (-len(tokenizer)) % 64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=(size // processor.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def build_folder(folder: Path, template: str = MARKED, seed: int = 0) -> Path:
    """Writes model and processor to `folder`."""
    processor = build_processor(template)
    build_model(processor, seed).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
