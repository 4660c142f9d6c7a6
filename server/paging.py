"""Cursors: opaque tokens that say where to go on, and fit one list or stream only."""

import base64
import binascii
import hashlib
from uuid import UUID

from server.errors import InvalidArgument, PageTokenInvalid

_DEFAULT_SIZE = 100
_LARGEST_SIZE = 1000
_TAG_BYTES = 8


def page_size(requested: int) -> int:
    """Return how many rows to read: 100 when nothing was asked for.

    Raises:
        InvalidArgument: It is negative or over 1000.
    """
    if not 0 <= requested <= _LARGEST_SIZE:
        raise InvalidArgument("page_size", f"must be 0 to {_LARGEST_SIZE}")
    return requested or _DEFAULT_SIZE


def encode(last: UUID, *list_identity: object) -> str:
    """Return the token of the page after the row `last` of one list.

    Args:
        last: Id of the last row of this page.
        list_identity: What makes this list different from others: name, user, filters.
    """
    return seal(last.bytes, *list_identity)


def decode(token: str, *list_identity: object) -> UUID | None:
    """Return the row that a page starts after, or None for the first page.

    Raises:
        PageTokenInvalid: The token is damaged, or was made for another list.
    """
    if not token:
        return None
    data = unseal(token, *list_identity)
    if data is None:
        raise PageTokenInvalid
    return UUID(bytes=data)


def seal(place: bytes, *identity: object) -> str:
    """Return a place in a list or stream as a token that fits no other."""
    return base64.urlsafe_b64encode(place + _tag(identity)).decode().rstrip("=")


def unseal(token: str, *identity: object) -> bytes | None:
    """Return the place that a token was made of; None for a damaged one, or another's."""
    try:
        data = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    place, tag = data[:-_TAG_BYTES], data[-_TAG_BYTES:]
    return place if tag == _tag(identity) else None


def _tag(list_identity: tuple[object, ...]) -> bytes:
    return hashlib.blake2b(repr(list_identity).encode(), digest_size=_TAG_BYTES).digest()
