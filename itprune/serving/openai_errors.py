"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}.

A message is one sentence. What was written elsewhere passes through `sentence_of`, which lets no
path and no second line out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

WRONG = "the server failed on this request; its log says why"
LONGEST = 400
"""Letters of a message."""
PATH = re.compile(r"(?<![\w:/.])(?:[A-Za-z]:)?[/\\~][^\s'\"]*[/\\][^\s'\",;)]*")
"""Two names deep: `/v1` is none."""
KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
"""Type of an error by its status; else it is the request's (4xx) or the server's (5xx)."""


class ApiError(Exception):
    """An answer to a request that cannot be met.

    Args:
        status: of HTTP.
        message: one sentence.
        code: a word for programs.
        param: the field that is wrong.
        wait: after how many seconds it may be asked again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        wait: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.wait = status, code, wait
        self.message = _writable(message)
        self.param = None if param is None else _writable(param)

    def body(self) -> Mapping[str, Any]:
        """What stands in the answer."""
        fallback = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": KINDS.get(self.status, fallback),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = {} if self.wait is None else {"retry-after": str(self.wait)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def _writable(text: str) -> str:
    """Without halves of letters, which a client may send and no answer can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def busy(message: str, wait: int = 5) -> ApiError:
    """It could be answered, but not now."""
    return ApiError(503, message, code="unavailable", wait=wait)


def sentence_of(error: Exception) -> str:
    """The first line of what was raised, without paths, and in the words of a request, which has
    `keep` where a recipe has `prune.keep`."""
    line = next(iter(str(error).splitlines()), "").strip() or WRONG
    line = PATH.sub("…", line).removeprefix("prune.")
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
