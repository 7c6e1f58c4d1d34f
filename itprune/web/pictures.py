"""Pictures as visitors upload them, opened with care."""

from __future__ import annotations

import io
import warnings

from PIL import Image

from itprune.question import DECODING_FAILS, is_thin, open_image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What browsers show; Pillow's other decoders are not offered to strangers."""


def read_picture(data: bytes, pixels: int) -> Image.Image:
    """Decodes an upload as RGB, as `itprune infer` decodes a file.

    Args:
        data: the file's bytes.
        pixels: the most a picture may have.

    Raises:
        ValueError: no picture, a damaged one, or one too large or too thin.
    """
    width, height = _size(data)
    if width * height > pixels:
        raise ValueError(
            f"the picture has {width}x{height} pixels, more than {pixels}; make it smaller first"
        )
    if is_thin((width, height)):
        raise ValueError(f"the picture has {width}x{height} pixels, which is a line; crop it first")
    try:
        # The formats again: a file may be one of ours and, to another decoder, something else.
        return open_image(io.BytesIO(data), FORMATS)
    except ValueError:  # its sentence names a file, and here is none
        raise ValueError("the picture is damaged or cut off; save it anew and try again") from None


def _size(data: bytes) -> tuple[int, int]:
    """Width and height as the header says, without decoding."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return image.size
    except Image.DecompressionBombError:
        raise ValueError("the picture has far too many pixels; make it smaller first") from None
    except DECODING_FAILS:
        raise ValueError(
            f"the file is not a picture that is read here; use {', '.join(FORMATS)}"
        ) from None
