"""Question: one request to a model, as messages with image places and the opened images.

It is read from a prompt, from chat messages or from a LLaVA record. Everything wrong with one
question is a ValueError of one sentence, raised before a model sees it. Roles, image places and
the stripping of line breaks are those of training, so that both see the same tokens.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from itprune.options import nearest

IMAGE = "<image>"
MAX_PIXELS = 89_478_485
"""Pillow's own limit, where it only warns."""
MAX_RATIO = 200
"""A processor that resizes the shorter side would make gigabytes of a thinner picture."""
PROGRAMS = ("EPS",)
"""Formats that Pillow would hand to an interpreter (Ghostscript), whatever the file is called."""
DECODING_FAILS = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    TypeError,
    LookupError,
    ArithmeticError,
    struct.error,
)
"""What Pillow's decoders raise when a file is not what it says."""
TURNS = dict(
    zip(
        range(2, 9),
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        strict=True,
    )
)
"""EXIF's orientations, 2 to 8, and what makes a picture upright."""
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
LAYOUTS = ("prompt", "messages", "conversations")

OpenImage = Callable[[str], Image.Image]
Content = list[dict[str, Any]]


@dataclass(frozen=True)
class Question:
    """What is asked: chat messages that end with a user turn, and one image per image place."""

    messages: tuple[dict[str, Any], ...]
    """{"role", "content": [{"type": "text", "text"} or {"type": "image"}, …]}."""
    images: tuple[Image.Image, ...] = ()

    def __post_init__(self) -> None:
        if not self.messages or self.messages[-1]["role"] != "user":
            raise ValueError("there is no user turn to answer")
        if not any(part["type"] == "text" for part in self.messages[-1]["content"]):
            raise ValueError("the prompt is empty")
        answers = [m for m in self.messages if m["role"] == "assistant"]
        if any(part["type"] == "image" for m in answers for part in m["content"]):
            raise ValueError(f"{IMAGE} stands in an assistant turn; only a user shows images")
        if any(_is_broken(text) for text in self.texts):
            raise ValueError("the text holds half a character (a lone surrogate); write it anew")
        places = sum(p["type"] == "image" for m in self.messages for p in m["content"])
        if places != len(self.images):
            raise ValueError(
                f"the text has {places} {IMAGE} but {len(self.images)} image(s) are given; "
                "write one for each image"
            )

    @property
    def texts(self) -> list[str]:
        """The text of each message, joined as templates do: some even write its images first."""
        return [
            "".join(part["text"] for part in message["content"] if part["type"] == "text")
            for message in self.messages
        ]

    @classmethod
    def from_prompt(cls, prompt: str, images: Sequence[Image.Image] = ()) -> Question:
        """One user turn. Without `<image>` in the prompt, the images stand before it."""
        content = split_text(prompt)
        if not any(part["type"] == "image" for part in content):
            content = [{"type": "image"} for _ in images] + content
        return cls(({"role": "user", "content": content},), tuple(images))

    @classmethod
    def from_record(cls, record: Any, open_image: OpenImage) -> Question:
        """A JSONL record: "prompt", "messages" or "conversations", and "image" or "images".

        An answer at the end (LLaVA data carries one) is left out; earlier ones are history.
        """
        if not isinstance(record, Mapping):
            raise ValueError(f"a record must be a JSON object, got {type(record).__name__}")
        layout = _layout(record)
        paths = _paths(record)
        if layout == "prompt":
            if not isinstance(record["prompt"], str):
                raise ValueError("`prompt` must be text")
            return cls.from_prompt(record["prompt"], [open_image(path) for path in paths])
        messages, own = _messages(record[layout], layout)
        left = iter(paths)
        wanted = [next(left, None) if path is None else path for path in own]
        ordered = [path for path in wanted if path is not None] + list(left)
        return cls(messages, tuple(open_image(path) for path in ordered))


def _is_broken(text: str) -> bool:
    """No tokenizer takes what cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def split_text(text: Any) -> Content:
    """A text with `<image>` places as content; line breaks around a place belong to it."""
    if not isinstance(text, str):
        raise ValueError(f"a message must be text, got {type(text).__name__}")
    return trimmed(_pieces(text))


def _pieces(text: str) -> Content:
    content: Content = []
    for index, piece in enumerate(text.split(IMAGE)):
        if index:
            content.append({"type": "image"})
        content.append({"type": "text", "text": piece})
    return content


def trimmed(content: Content) -> Content:
    """Content without space around image places and at its ends, and without empty texts. Space
    between two texts is theirs: a template writes none, and their words would become one."""
    found: Content = []
    for is_text, group in groupby(content, lambda part: part["type"] == "text"):
        parts = list(group)
        found += _trimmed_texts(parts) if is_text else parts
    return found


def _trimmed_texts(texts: Content) -> Content:
    said = [index for index, part in enumerate(texts) if part["text"].strip()]
    if not said:
        return []
    inner = [dict(part) for part in texts[said[0] : said[-1] + 1] if part["text"]]
    inner[0]["text"] = inner[0]["text"].lstrip()
    inner[-1]["text"] = inner[-1]["text"].rstrip()
    return inner


def _layout(record: Mapping[str, Any]) -> str:
    found = [name for name in LAYOUTS if record.get(name) is not None]
    if len(found) != 1:
        given = " and ".join(f"`{name}`" for name in found) or "none of them"
        raise ValueError(f"a record needs one of {', '.join(LAYOUTS)}, and has {given}")
    return found[0]


def _paths(record: Mapping[str, Any]) -> list[str]:
    given = record.get("images") if record.get("images") is not None else record.get("image")
    paths = [] if given is None else given if isinstance(given, list) else [given]
    for path in paths:
        if not isinstance(path, str):
            raise ValueError(f"an image must be a path, got {type(path).__name__}")
    return paths


def _messages(turns: Any, layout: str) -> tuple[tuple[dict[str, Any], ...], list[str | None]]:
    """The turns up to the last question, and each image place's own path (None: it has none)."""
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(f"`{layout}` must be a list of turns")
    role, text = ("from", "value") if layout == "conversations" else ("role", "content")
    messages: list[dict[str, Any]] = [
        {"role": _role(turn.get(role)), "content": _content(turn.get(text))} for turn in turns
    ]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    places = [part for m in messages for part in m["content"] if part["type"] == "image"]
    return tuple(messages), [part.pop("path", None) for part in places]


def _role(name: Any) -> str:
    if not isinstance(name, str) or name not in ROLES:
        raise ValueError(f"unknown role {name!r}; {nearest(str(name), ROLES)}")
    return ROLES[name]


def _content(content: Any) -> Content:
    if not isinstance(content, list):
        return split_text(content)
    parts: Content = []
    for item in content:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "text" and isinstance(item.get("text"), str):
            parts.extend(_pieces(item["text"]))
        elif kind == "image":
            path = item.get("path", item.get("image"))
            if path is not None and not isinstance(path, str):
                raise ValueError(f"an image must be a path, got {type(path).__name__}")
            parts.append({"type": "image"} if path is None else {"type": "image", "path": path})
        else:
            raise ValueError("a content item must be {type: text, text} or {type: image}")
    return trimmed(parts)


# ------------------------------------------------------------------------------------- images
class ImageFolder:
    """Opens images of a data file, only inside `root`; links placed in `root` are followed."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))

    def __call__(self, name: str) -> Image.Image:
        if "://" in name or name.startswith("data:"):
            raise ValueError(f"image {name[:60]!r} is an address; save it as a file first")
        path = Path(os.path.normpath(self.root / name))
        if not path.is_relative_to(self.root):
            raise ValueError(
                f"image {name!r} lies outside {self.root}; name its folder with --image-root"
            )
        return open_image(path)


def open_image(
    source: str | Path | io.BytesIO, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Reads an image as RGB.

    Args:
        source: a file, or its bytes.
        formats: those it may have; None: any.

    Raises:
        ValueError: missing, unreadable, or of a size or kind that no picture honestly has.
    """
    if not isinstance(source, io.BytesIO) and not Path(source).is_file():
        raise ValueError(f"missing image {source}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source, formats=formats)
        with image:
            wrong = refusal(image)  # the header alone must not make us decode gigabytes
            if not wrong:
                return as_rgb(image)
    except Image.DecompressionBombError:
        raise ValueError(
            f"image {source} has more than {2 * MAX_PIXELS} pixels; make it smaller first"
        ) from None
    except DECODING_FAILS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"unreadable image {source} ({reason})") from None
    raise ValueError(f"image {source} {wrong}")


def refusal(image: Image.Image) -> str:
    """Why an image whose header was read is not decoded; empty: it may be."""
    size = f"{image.width}x{image.height}"
    if image.width * image.height > MAX_PIXELS:
        return f"has {size} pixels, more than {MAX_PIXELS}; make it smaller first"
    if is_thin(image.size):
        return f"has {size} pixels, one side more than {MAX_RATIO} times the other; crop it first"
    if image.format in PROGRAMS:
        return f"is a program ({image.format}), not a picture; save it as PNG first"
    return ""


def is_thin(size: tuple[int, int]) -> bool:
    """Whether width and height are those of a line."""
    return max(size) > MAX_RATIO * min(size)


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture in RGB, eight bits a channel, the way up it was taken; 16 bits of grey are scaled,
    where Pillow would cut off all that is above 255."""
    image = _upright(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """A photo as its EXIF data says it was taken, which is how people see it."""
    image.load()  # Pillow turns TIFF itself while it does
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DECODING_FAILS:
        return image  # whatever a camera wrote beside them, the pixels are good
    return image if turn is None else image.transpose(turn)
