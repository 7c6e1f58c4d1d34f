"""Opening images: lazily, as RGB, inside the allowed folder, and never a decompression bomb.

An image is a path, bytes, a {"bytes", "path"} record as `datasets` writes it, or a data address
(`data:image/png;base64,...`), which carries its bytes. Nothing is ever fetched.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import warnings
from pathlib import Path
from typing import Any

from PIL import Image

from itprune.question import DECODING_FAILS, as_rgb, refusal
from train.data.sample import BadSample

DATA = "data:"
MAX_DATA = 64 * 1024 * 1024
"""Characters of a data address."""


class ImageOpener:
    """Opens the images of samples.

    Relative paths are joined to `root`. With `strict` (an image_root was named) a path may not be
    absolute; a path that climbs out of `root` through `..` is refused in any case.
    """

    def __init__(self, root: Path, strict: bool) -> None:
        self.root = root
        self.strict = strict

    def __call__(self, image: Any) -> Image.Image:
        """Opens a path, a data address, bytes, a {"bytes", "path"} record or a PIL image.

        Raises:
            BadSample: missing, unreadable, too large, or outside the folder.
        """
        if isinstance(image, Image.Image):
            return _checked(image, "an image")
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, bytes):
            return _open(io.BytesIO(image), "an image of the record")
        if not isinstance(image, str):
            raise BadSample(f"an image must be a path, got {type(image).__name__}")
        if image.startswith(DATA):
            return _open(io.BytesIO(_data(image)), "an image of the record")
        path = self.locate(image)
        try:
            there = path.is_file()
        except OSError as error:  # bare base64 in place of a name is too long for one
            raise BadSample(f"image {image[:40]!r} is no path ({error.strerror})") from None
        if not there:
            raise BadSample(f"missing image {path}")
        return _open(path, str(path))

    def locate(self, name: str) -> Path:
        """The file of a path in the data."""
        if "://" in name:
            raise BadSample(f"image {name!r} is an address; download it first")
        if os.path.isabs(name):
            if self.strict:
                raise BadSample(f"absolute image path {name!r}, but data.image_root is set")
            return Path(name)
        inside = Path(os.path.normpath(name))
        if ".." in inside.parts:
            raise BadSample(f"image path {name!r} leaves {self.root}")
        return self.root / inside


def _data(address: str) -> bytes:
    """The bytes that a data address carries."""
    head, comma, body = address.partition(",")
    if not comma or not head.endswith(";base64"):
        raise BadSample(f"image {head[:40]!r} is no data:image/...;base64, address")
    if len(body) > MAX_DATA:
        raise BadSample(f"image of {len(body)} characters in the record, more than {MAX_DATA}")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise BadSample(f"image {head[:40]!r} is not valid base64") from None


def _open(source: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source)
        return _checked(image, name)
    except (*DECODING_FAILS, Image.DecompressionBombError) as error:
        if isinstance(error, BadSample):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadSample(f"unreadable image {name} ({reason})") from None


def _checked(image: Image.Image, name: str) -> Image.Image:
    """Size first, pixels afterwards: the header alone must not make us decode gigabytes."""
    wrong = refusal(image)
    if wrong:
        raise BadSample(f"image {name} {wrong}")
    return as_rgb(image)
