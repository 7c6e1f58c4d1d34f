"""What a processor makes of a conversation, and how rows become a batch: for every family alike.

Processors differ in what they return beside token ids: tiles, grids, sizes, kinds of tokens. All
that has to be known of it here is how its rows are joined.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor, ProcessorMixin

IGNORED = -100
"""Label of a token that is not supervised."""
PER_TOKEN = {
    "input_ids": 0,
    "attention_mask": 0,
    "labels": IGNORED,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
}
"""Inputs with one value for each token, and what fills them up; ids are filled by the caller's."""
TILED = {"pixel_values": 5, "pixel_attention_mask": 4}
"""Inputs that may hold several tiles an image, and their axes then: blank tiles fill them up."""
PACKAGE = re.compile(r"requires the (\w+) library|[Pp]ackage `(\w+)`|No module named '(\w+)'")


def load_processor(path: str | Path) -> Any:
    """The processor of a model's folder or hub name, with a tokenizer and an image processor.

    Raises:
        ValueError: there is none, or it needs a package that is not installed.
    """
    if str(path).startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise ValueError(f"{path}: no such folder")
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except StrictDataclassError as error:
        raise bad_config(path, error) from None
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise ValueError(_refusal(path, error)) from None
    parts = processor.get_attributes() if isinstance(processor, ProcessorMixin) else ()
    for name in ("tokenizer", "image_processor"):
        if name not in parts:
            raise ValueError(f"{path}: its processor has no {name}")
    return processor


def bad_config(path: str | Path, error: StrictDataclassError) -> ValueError:
    """What to raise where config.json holds a value of the wrong kind."""
    return ValueError(f"{path}: config.json: {' '.join(str(error).split())}")


def _refusal(path: str | Path, error: Exception) -> str:
    text = str(error).strip()
    missing = PACKAGE.search(text)
    if missing is None:
        line = text.splitlines()[0] if text else type(error).__name__
        return f"{path}: no processor ({line})"
    name = next(group for group in missing.groups() if group).lower()
    return (
        f"{path}: the processor of this model needs the package {name}, which is not installed "
        f"(pip install {name}); a model attached in Python needs no processor"
    )


def placeholder_ids(processor: Any) -> tuple[int, ...]:
    """Ids a processor writes where images and videos stand."""
    ids = [*processor.image_token_ids, *processor.video_token_ids]
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


def reserved_texts(processor: Any) -> tuple[str, ...]:
    """What a text must not contain, since the processor would take it for an image or a video."""
    own = [vars(processor).get(name) for name in ("image_token", "video_token")]
    spelt = processor.tokenizer.convert_ids_to_tokens(list(placeholder_ids(processor)))
    return tuple(dict.fromkeys(text for text in (*own, *spelt) if text))


# ---------------------------------------------------------------- conversations without a template
def takes_suffix(processor: Any) -> bool:
    """Whether a processor knows no turns, but one prompt and the answer behind it (PaliGemma)."""
    cls = type(processor)
    call = inspect.signature(cls.__call__).parameters
    # Up to transformers 5.17 the option is one of those of its text.
    text = cls.valid_processor_kwargs.__annotations__["text_kwargs"].__annotations__
    return not processor.chat_template and ("suffix" in call or "suffix" in text)


def plain_prompt(messages: Sequence[Mapping[str, Any]], image_token: str) -> str:
    """The only turn as such a processor takes it: images first.

    Raises:
        ValueError: there are other turns.
    """
    if [message["role"] for message in messages] != ["user"]:
        raise ValueError(
            "this model has no chat template: it answers one question and knows no other turns"
        )
    content = messages[0]["content"]
    texts = [part["text"] for part in content if part["type"] == "text"]
    return image_token * (len(content) - len(texts)) + " ".join(texts)


# ------------------------------------------------------------------------------------ batches
def join(rows: Sequence[Mapping[str, Tensor]], pad_token_id: int, side: str) -> dict[str, Tensor]:
    """Encoded rows as one batch.

    Args:
        rows: per row, inputs with one value a token (T,) and image inputs, joined along their
            first axis, so that rows may hold no, one or several images.
        pad_token_id: fills input_ids.
        side: right or left, where shorter rows are padded.

    Raises:
        ValueError: images that do not fit into one tensor.
    """
    fill = {**PER_TOKEN, "input_ids": pad_token_id}
    batch = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        tensors = [row[key] for row in rows if key in row]
        if key in fill:
            batch[key] = pad_sequence(
                tensors, batch_first=True, padding_value=fill[key], padding_side=side
            )
        else:
            batch[key] = _cat(key, tensors)
    return batch


def _cat(key: str, tensors: Sequence[Tensor]) -> Tensor:
    shapes = [tensor.shape[1:] for tensor in tensors]
    if len(set(shapes)) == 1:
        return torch.cat(list(tensors))
    if any(tensor.ndim != TILED.get(key) for tensor in tensors):
        raise ValueError(
            f"images or videos of unlike shapes cannot be one batch of this model ({key}: "
            f"{', '.join(str(tuple(shape)) for shape in dict.fromkeys(shapes))}); use a batch size "
            "of 1"
        )
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    return torch.cat([_filled(tensor, largest) for tensor in tensors])


def _filled(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros behind a tensor's axes but the first, up to `shape`."""
    missing = [want - have for want, have in zip(shape, tensor.shape[1:], strict=True)]
    return F.pad(tensor, [size for amount in reversed(missing) for size in (0, amount)])
