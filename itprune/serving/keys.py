"""Keys: who asks, and whether that is too often."""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections.abc import Callable, Iterable

from starlette.requests import Request

from itprune.serving.openai_errors import ApiError

SHORTEST = 8
"""Letters of a key: less is no secret."""
CLIENTS = 10_000
"""Clients whose pace is remembered."""
MINUTE = 60.0


def check_keys(keys: Iterable[str]) -> None:
    """Refuses what can be guessed.

    Raises:
        ValueError: one of them is short.
    """
    if any(len(key) < SHORTEST for key in keys):
        raise ValueError(f"an API key must have at least {SHORTEST} letters")


class Keys:
    """Knows who may ask.

    Args:
        keys: any of them opens the server; none: everybody may ask.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    def client(self, request: Request) -> str:
        """Who asks: one of the keys, or else an address.

        Raises:
            ApiError: 401, the key is missing or wrong.
        """
        if not self._digests:
            return request.client.host if request.client is not None else ""
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # All are compared, in constant time: how long it takes tells nothing of them.
        same = [hmac.compare_digest(given, digest) for digest in self._digests]
        if kind.lower() != "bearer" or not any(same):
            raise ApiError(
                401, "a valid API key is needed: Authorization: Bearer KEY", "invalid_api_key"
            )
        return f"key {same.index(True)}"


class Pace:
    """How often each client asks: a bucket of `rate` requests that fills up within a minute.

    Args:
        rate: requests in a minute.
        now: seconds that never go back.
    """

    def __init__(self, rate: int, now: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.now = rate, now
        self._left: dict[str, tuple[float, float]] = {}
        """Client -> requests left, and when that was. Who asked last stands last."""

    def take(self, client: str) -> None:
        """Counts one request.

        Raises:
            ApiError: 429, with when to ask again.
        """
        now, each = self.now(), MINUTE / self.rate
        left, then = self._left.pop(client, (float(self.rate), now))
        left = min(left + (now - then) / each, float(self.rate))
        if len(self._left) >= CLIENTS:
            del self._left[next(iter(self._left))]
        self._left[client] = (left - 1 if left >= 1 else left, now)
        if left < 1:
            raise ApiError(
                429,
                f"this server takes {self.rate} requests a minute from one client; wait a little",
                code="rate_limit_exceeded",
                wait=math.ceil((1 - left) * each),
            )
