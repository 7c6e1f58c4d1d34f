"""Opening images: lazily, as RGB, inside the allowed folder, and never a decompression bomb."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any

from PIL import Image

from itprune.question import MAX_PIXELS
from train.data.sample import BadSample


class ImageOpener:
    """Opens the images of samples.

    Relative paths are joined to `root`. With `strict` (an image_root was named) a path may not be
    absolute; a path that climbs out of `root` through `..` is refused in any case.
    """

    def __init__(self, root: Path, strict: bool) -> None:
        self.root = root
        self.strict = strict

    def __call__(self, image: Any) -> Image.Image:
        """Opens a path, bytes, a {"bytes", "path"} record or a PIL image.

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
        path = self.locate(image)
        if not path.is_file():
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


def _open(source: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source)
        return _checked(image, name)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, BadSample):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadSample(f"unreadable image {name} ({reason})") from None


def _checked(image: Image.Image, name: str) -> Image.Image:
    """Size first, pixels afterwards: the header alone must not make us decode gigabytes."""
    if image.width * image.height > MAX_PIXELS:
        raise BadSample(f"{name} has {image.width}x{image.height} pixels, more than {MAX_PIXELS}")
    return image.convert("RGB")
