"""Questions to a server as a program without a browser asks them."""

from __future__ import annotations

import http.client
import io
import json
from typing import Any
from urllib.parse import urlsplit

from PIL import Image, ImageDraw

BOUNDARY = "----a-boundary"
FIELDS = {"prompt": "What digit is red?", "method": "itprune", "keep": "0.3"}


def png(size: tuple[int, int] = (96, 96), seed: int = 0) -> bytes:
    """A picture with something in it."""
    image = Image.new("RGB", size, "#223344")
    at = 8 + 5 * seed
    ImageDraw.Draw(image).ellipse((at, at, at + 30, at + 40), fill="#ee3322")
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def form(picture: bytes | None, **fields: str) -> tuple[bytes, dict[str, str]]:
    """A multipart body and its headers."""
    parts = []
    for name, value in {**FIELDS, **fields}.items():
        head = f'Content-Disposition: form-data; name="{name}"\r\n\r\n'
        parts.append(head.encode() + value.encode())
    if picture is not None:
        head = 'Content-Disposition: form-data; name="picture"; filename="../../a.png"\r\n'
        parts.append(head.encode() + b"Content-Type: image/png\r\n\r\n" + picture)
    mark = f"--{BOUNDARY}".encode()
    body = b"".join(mark + b"\r\n" + part + b"\r\n" for part in parts) + mark + b"--\r\n"
    return body, {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def events(text: str) -> list[dict[str, Any]]:
    """What a stream told."""
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


def answers(told: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Column -> its `done` event."""
    return {event["column"]: event for event in told if event["kind"] == "done"}


def connect(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)


def post(url: str, picture: bytes | None, **fields: str) -> tuple[int, str]:
    """Status and body of one question to a running server."""
    connection = connect(url)
    body, headers = form(picture, **fields)
    connection.request("POST", "/api/ask", body, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text
