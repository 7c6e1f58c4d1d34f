"""Addresses: which of them reach this machine only."""

from __future__ import annotations

import ipaddress


def is_loopback(name: str) -> bool:
    """Whether an address reaches this machine only."""
    if name == "localhost":
        return True
    return is_number(name) and ipaddress.ip_address(name).is_loopback


def is_number(name: str) -> bool:
    """Whether an address is written in numbers, not as a name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
