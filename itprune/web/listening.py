"""Listening: the socket a server listens at, and who may reach it."""

from __future__ import annotations

import errno
import socket

from itprune.web.addresses import is_loopback


def check_host(host: str, port: int, allow_remote: bool, what: str) -> bool:
    """Refuses to serve others unless that is meant.

    Args:
        host: the address as the user named it.
        port: 0: any free one.
        allow_remote: whether others are meant.
        what: is served: "this page".

    Returns:
        Whether others can reach it.

    Raises:
        ValueError: in one sentence.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port: must be 0 to 65535, got {port}")
    if is_loopback(host):
        return False
    if not allow_remote:
        raise ValueError(
            f"--host {host} lets others use {what}; add --allow-remote if that is meant"
        )
    return True


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens already, so that a second server hears at once that the port is taken.

    Raises:
        ValueError: the port or the address cannot be had.
    """
    try:
        kind, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise ValueError(f"--host {host}: no such address") from None
    listener = socket.socket(kind, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"--port {port} is in use on {host}; choose another, or 0 for any free one"
            ) from None
        raise ValueError(f"--host {host} --port {port}: {error.strerror}") from None
    return listener


def address(listener: socket.socket) -> str:
    """What to open in a browser."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
