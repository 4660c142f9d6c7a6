"""Etags: the version of a resource as the API shows it, against lost updates."""

import re
from typing import Final

from server.errors import EtagMismatch

_ETAG: Final = re.compile(r"v([0-9]{1,18})\Z")


def show(version: int) -> str:
    """Return the etag of a version, such as v3."""
    return f"v{version}"


def parse(etag: str) -> int | None:
    """Return the version that an etag stands for; None for no etag: any version will do.

    Raises:
        EtagMismatch: It is the etag of nothing.
    """
    if not etag:
        return None
    match = _ETAG.match(etag)
    if match is None:
        raise EtagMismatch
    return int(match[1])
