"""Ids: a prefix that names the kind of resource, and a UUIDv7 in 32 hexadecimal digits."""

import os
import re
import threading
import time
from collections.abc import Iterable
from typing import Final
from uuid import UUID

from asyncpg.pgproto import pgproto

from server.errors import InvalidArgument

USER: Final = "usr"
TENANT: Final = "ten"
MEMORY: Final = "mem"
ATTACHMENT: Final = "att"
MEDITATION: Final = "med"
GOAL: Final = "goa"
JOB: Final = "job"
SCHEDULE: Final = "sch"
AUDIT_EVENT: Final = "aud"
SESSION: Final = "ses"
API_KEY: Final = "key"
AGENT: Final = "agt"
INVITATION: Final = "inv"
ERASURE: Final = "era"
RECEIPT: Final = "rcp"
EXPORT: Final = "exp"

ABOVE_ALL: Final = UUID(int=(1 << 128) - 1)
"""No id is as high: where a list begins that goes down."""

BYTES: Final = 16
"""How long an id is in a column."""

_HEX = re.compile(r"[0-9a-f]{32}\Z")
_last = 0
_lock = threading.Lock()


def new_id() -> UUID:
    """Return a UUIDv7 that is greater than every one this process made before.

    The 12 bits after the millisecond hold its fraction (RFC 9562, section 6.2, method 3), so
    that ids sort in the order in which they were made.
    """
    global _last  # noqa: PLW0603 - the last instant is the one thing that all calls share
    with _lock:
        nanoseconds = time.time_ns()
        instant = (nanoseconds // 1_000_000) << 12 | (nanoseconds % 1_000_000) * 4096 // 1_000_000
        instant = _last = max(instant, _last + 1)
    random = int.from_bytes(os.urandom(8)) & (1 << 62) - 1
    return UUID(
        int=(instant >> 12) << 80 | 0x7 << 76 | (instant & 0xFFF) << 64 | 0b10 << 62 | random
    )


def show(kind: str, value: UUID) -> str:
    """Return the id as the API shows it, such as mem_0198c0f3a5e07c3a9f0c5a1b2c3d4e5f."""
    return f"{kind}_{value.hex}"


def parse(kind: str, text: str, field: str) -> UUID:
    """Read an id that a caller sent.

    Raises:
        InvalidArgument: It is not an id of this kind; the violation names the field.
    """
    prefix, _, digits = text.partition("_")
    if prefix != kind or not _HEX.match(digits):
        raise InvalidArgument(field, f"must be {kind}_ and 32 hexadecimal digits")
    return UUID(digits)


def packed(values: Iterable[UUID]) -> bytes:
    """Return ids as a column: 16 bytes each."""
    return b"".join([value.bytes for value in values])


def unpacked(column: bytes) -> list[UUID]:
    """Return the ids of a column.

    They are the driver's own UUIDs, which are like others but made in a tenth of the time.
    """
    return [pgproto.UUID(column[start : start + BYTES]) for start in range(0, len(column), BYTES)]
