"""Guards: who may speak to a server.

A page of another site can send requests to a server on this machine, and by DNS rebinding even read
the answers. Such a request carries the other site's name in `Host` or `Origin`; it is refused.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from itprune.web.addresses import is_loopback, is_number

HEADERS = {"x-content-type-options": "nosniff", "cache-control": "no-store"}
"""Of every answer of every server."""


class Guards:
    """Wraps an application: refuses strangers, and sets the headers of every answer.

    Args:
        app: the application.
        host: the address it is bound to.
        refuse: from one sentence to an answer with status 403.
        names: further names it goes by, such as that of a proxy before it.
        headers: of every answer, beside `HEADERS`.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        refuse: Callable[[str], Response],
        names: Iterable[str] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.app, self.refuse = app, refuse
        self.headers = {**HEADERS, **(headers or {})}
        self.open = not is_loopback(host)
        self.names = frozenset((*_names(host), *(name.lower() for name in names)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope["method"], Headers(scope=scope))

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        if refusal is None:
            await self.app(scope, receive, guarded)
        else:
            await self.refuse(refusal)(scope, receive, guarded)

    def _refusal(self, method: str, headers: Headers) -> str | None:
        """One sentence to a request that is not from our own page; None: it may pass."""
        host = headers.get("host", "")
        if not self._known(host):
            return "this server does not go by that name; open the address it printed"
        if method in ("GET", "HEAD"):
            return None
        origin = headers.get("origin")  # browsers always send it here; other programs need not
        if origin is not None and origin.partition("://")[2] != host:
            return "this request comes from another site's page"
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return "this request comes from another site's page"
        return None

    def _known(self, host: str) -> bool:
        """Whether a Host header names this server. Where others are let in it may also be any
        address in numbers: rebinding needs a name."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.names or (is_number(name) if self.open else is_loopback(name))


def _names(host: str) -> Iterable[str]:
    """Names of this server, beside addresses in numbers."""
    yield from ("localhost", host.lower())
    if not is_loopback(host):
        yield socket.gethostname().lower()
