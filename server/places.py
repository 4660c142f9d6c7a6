"""Where a call comes from: a network address, as the edge saw it."""

import ipaddress
from contextvars import ContextVar
from typing import Final

_WHOLE_ADDRESS: Final = 32
_ONE_CUSTOMER: Final = 64
"""Of IPv6 one customer has at least a whole /64."""

_address: ContextVar[str] = ContextVar("address", default="")


def place_of(address: str) -> str:
    """Return where an address is, such as "192.0.2.1/32"; of what is no address, ""."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return ""
    # Else all of IPv4 would be one customer of IPv6.
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    prefix = _WHOLE_ADDRESS if parsed.version == 4 else _ONE_CUSTOMER
    return str(ipaddress.ip_network((parsed, prefix), strict=False))


def current_place() -> str:
    """Return where the call that is being served comes from; "" where nobody can tell."""
    return place_of(_address.get())


def set_address(address: str) -> None:
    """Say from which address the call comes, for the rest of the current task."""
    _address.set(address)
