"""Asking: an upload becomes a question, or a refusal of one sentence."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from itprune.app.limits import Limits
from itprune.app.session import Ask
from itprune.web.bodies import Refusal, bounded

FIELDS = ("prompt", "method", "keep", "max_new_tokens", "beside")
LONGEST = 128
"""Tokens of an answer where nothing is said of it."""


class InMemory(MultiPartParser):
    """Starlette's parser, which would write large files to disk; bodies are bounded here."""

    spool_max_size = 1 << 40


async def read_ask(request: Request, limits: Limits) -> Ask:
    """Reads a multipart form with the file `picture` and the fields `FIELDS`.

    Raises:
        Refusal: wrong type, too large, too slow, or malformed.
    """
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise Refusal(415, "send a form of type multipart/form-data with picture and prompt")
    too_large = f"the upload is larger than {limits.body_mb:g} MB; use a smaller picture"
    body = bounded(request, limits.body_bytes, too_large)
    parser = InMemory(request.headers, body, max_files=1, max_fields=len(FIELDS))
    try:
        async with asyncio.timeout(limits.upload_seconds):
            form = await parser.parse()
    except TimeoutError:
        raise Refusal(408, "the upload took too long; try a smaller picture") from None
    except (MultiPartException, FormParserError, KeyError, UnicodeError):
        raise Refusal(400, "the form cannot be read; send it as multipart/form-data") from None
    picture = form.get("picture")
    if not isinstance(picture, UploadFile):
        raise Refusal(422, "there is no picture; choose one")
    fields = {key: value for key, value in form.items() if isinstance(value, str)}
    return _ask(
        await picture.read(), {"max_new_tokens": str(min(LONGEST, limits.answer)), **fields}
    )


def _ask(picture: bytes, fields: Mapping[str, str]) -> Ask:
    unknown = sorted(fields.keys() - set(FIELDS))
    if unknown:
        raise Refusal(422, f"the form has a field that is not known; valid: {', '.join(FIELDS)}")
    missing = [name for name in ("prompt", "method", "keep") if name not in fields]
    if missing:
        raise Refusal(422, f"the form lacks the field {missing[0]}")
    return Ask(
        picture=picture,
        prompt=fields["prompt"].replace("\r\n", "\n"),  # how browsers write a line break in forms
        method=fields["method"],
        keep=_number("keep", fields["keep"]),
        max_new_tokens=_whole("max_new_tokens", fields["max_new_tokens"]),
        beside=fields.get("beside") == "1",
    )


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise Refusal(422, f"{name}: must be a number") from None


def _whole(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise Refusal(422, f"{name}: must be a whole number")
    return int(text)
