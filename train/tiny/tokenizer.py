"""The tiny model's tokenizer and processor.

Byte-level BPE trained on the scenes' own questions, so that every word of theirs is one token
while any other text still encodes. The chat template is LLaVA's `USER: ... ASSISTANT: ...` form
with the answers (and their end-of-sequence token) marked as generation.
"""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from train.scenes.questions import BASE, SETS, scene_items
from train.scenes.render import PATCH, SIZE, sample_scenes
from train.tiny.captions import CAPTIONS

SPECIAL = ["<pad>", "<s>", "</s>", "<image>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{{ ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ ' ' }}"
    "{% else %}{{ 'ASSISTANT:' }}{% generation %}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ ' ' + part['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def corpus(size: int = 4000) -> list[str]:
    """Conversations of every kind, captions included, as plain text."""
    rng = np.random.default_rng(0)
    scenes = sample_scenes(rng, size, "train")
    asked = ("rightmost", "topmost", "leftmost_colour", "is_there")
    kinds = [*BASE.values(), *(SETS["all"][name] for name in asked), *CAPTIONS.values()]
    lines = []
    for index in range(size):
        dialogue = kinds[index % len(kinds)](scene_items(scenes, index), rng)
        if dialogue:
            turns = "\n".join(f"USER: {q} ASSISTANT: {a}\n{q}" for q, a in dialogue.turns)
            lines.append(turns)
    return lines


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same text always gives the same tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=1024,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Tokenizer and image processor as one: 96 x 96 pictures, values scaled to -1..1."""
    picture = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=picture,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
