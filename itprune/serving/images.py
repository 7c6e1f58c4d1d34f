"""Images: from a URL of a request to a picture. Nothing is ever fetched.

A data URL carries the picture itself. A file is opened only where the server was started with a
folder of them, and only inside it: links are followed first, and what then lies elsewhere, is no
ordinary file or is too large is refused in one sentence that tells nothing of the disk.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

from itprune.serving.limits import Limits
from itprune.web.pictures import read_picture

DATA = re.compile(r"data:(image/[\w.+-]{1,40});base64,", re.IGNORECASE)
SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
NO_FETCHING = "this server fetches no addresses; send the picture itself as a data URL"
NO_FILES = "this server opens no files; send the picture itself as a data URL"
NO_FILE = "there is no such picture among the files this server may open"
BAD_DATA = "the data URL must read data:image/png;base64,… (or jpeg, webp, gif, bmp)"


class Pictures:
    """Opens pictures.

    Args:
        limits: of the server.
        folder: whose files may be opened; None: no files.
    """

    def __init__(self, limits: Limits, folder: Path | None = None) -> None:
        self.limits = limits
        self.folder = None if folder is None else folder.resolve()

    def __call__(self, urls: Sequence[str]) -> tuple[Image.Image, ...]:
        """All pictures of a request.

        Raises:
            ValueError: one of them is none, or there are too many.
        """
        most = self.limits.images
        if len(urls) > most:
            raise ValueError(f"the request has {len(urls)} images, more than {most}")
        pictures, pixels = [], 0
        for url in urls:
            picture = read_picture(self._bytes(url), self.limits.pixels)
            pixels += picture.width * picture.height
            if pixels > self.limits.pixels:
                raise ValueError(
                    f"the images have more than {self.limits.pixels} pixels together; make them "
                    "smaller first"
                )
            pictures.append(picture)
        return tuple(pictures)

    def _bytes(self, url: str) -> bytes:
        start = url[:10].lower()
        if start.startswith("data:"):
            return _decoded(url)
        if start.startswith("file:"):
            return self._file(_local(url))
        if start.startswith("//") or SCHEME.match(url):
            raise ValueError(NO_FETCHING)
        return self._file(url)

    def _file(self, name: str) -> bytes:
        if self.folder is None:
            raise ValueError(NO_FILES)
        try:
            path = (self.folder / name).resolve(strict=True)
            if not path.is_relative_to(self.folder):
                raise ValueError(NO_FILE)
            return _read(path, self.limits.body_bytes)
        except (OSError, ValueError, RuntimeError):  # missing, a zero in its name, links in a ring
            raise ValueError(NO_FILE) from None


def _decoded(url: str) -> bytes:
    head = DATA.match(url)
    if head is None:
        raise ValueError(BAD_DATA)
    try:
        return base64.b64decode(url[head.end() :].encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise ValueError("the data URL is not valid base64") from None


def _local(url: str) -> str:
    """The path of a file URL.

    Raises:
        ValueError: it names another machine.
    """
    rest = url[len("file:") :]
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host not in ("", "localhost"):
            raise ValueError(NO_FETCHING)
        rest = slash + path
    return unquote(rest)


def _read(path: Path, most: int) -> bytes:
    """An ordinary file's bytes; nothing else is waited for.

    Raises:
        OSError: it cannot be opened, or is none, or is larger.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > most:
            raise OSError
        return file.read(most)
