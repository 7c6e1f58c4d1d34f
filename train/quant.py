"""Mode `qlora`: the frozen language model in 4 bits (bitsandbytes), adapters on top of it.

Only the decoder's linear layers are quantised. Vision encoder, projector, mergers, newline vectors,
embeddings and head keep their type: they are small beside it, the projector may train, and what
they make would be wrong in every token. Which modules these are is asked of the family.

A checkpoint holds adapters alone and names the base model as it was published, so inference and
`itprune merge` work on the whole weights: merging into rounded ones would round twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from itprune.families import find_family
from train.recipe.sections import QuantSection


def quantization(
    section: QuantSection, path: str, compute: torch.dtype, sharded: bool = False
) -> Any:
    """What `from_pretrained` needs to load a model in 4 bits.

    Args:
        section: the recipe's.
        path: the base model, whose modules are named from its configuration alone.
        compute: the type 4-bit weights are multiplied in, and the type of all others.
        sharded: FSDP takes packed weights apart only where they look like the other ones.

    Raises:
        ValueError: the configuration cannot be read.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=section.type,
        bnb_4bit_use_double_quant=section.double,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=compute if sharded else torch.uint8,
        llm_int8_skip_modules=outside_decoder(skeleton(path)),
    )


def skeleton(path: str) -> Any:
    """The base model without weights.

    Raises:
        ValueError: its configuration cannot be read.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig
    from transformers.modeling_utils import set_zero3_state

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"model.path: {path}: {reason}") from None
    if "quantization_config" in config.to_dict():
        raise ValueError(
            f"model.path: {path}: its weights are quantised already; name the model they were made "
            "from, into which the adapters can be merged"
        )
    # Under ZeRO-3 a sub-model would be divided among the ranks; what has no weights cannot be.
    with torch.device("meta"), set_zero3_state():
        return kind(config)


def outside_decoder(model: Any) -> list[str]:
    """Names of the largest modules that hold nothing of the language model's decoder.

    They are whole paths because transformers matches them from the start of a module's path.
    """
    decoder = find_family(model).text_model
    path = next(name for name, module in model.named_modules() if module is decoder).split(".")
    names = []
    for depth, step in enumerate(path):
        children = model.get_submodule(".".join(path[:depth])).named_children()
        names += [".".join((*path[:depth], child)) for child, _ in children if child != step]
    return names


def keep_layout(model: nn.Module) -> None:
    """Keeps 4-bit weights in the layout that has gradients.

    On a CPU with AVX512-BF16, bitsandbytes packs a layer's weights for speed in its first forward
    without gradients, an evaluation or a calibration say. The kernel for packed weights has no
    backward: layers before it silently learn nothing from then on. Each layer asks an attribute of
    its own whether to pack.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit) and "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False
