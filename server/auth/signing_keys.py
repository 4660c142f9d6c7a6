"""The life of a signing key: published, signing, retired, withdrawn.

A key is published before it signs, so that everyone who keeps a copy of the key set has it when
the first token appears; and it stays published until the last token that it signed has expired.
Where a key stands follows from the clock and from when its successor takes over: processes that
read the same rows agree without talking to each other.
"""

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

PUBLISHED_BEFORE: Final = timedelta(seconds=60)
"""Longer than anyone keeps a copy of the key set: 20 s, and a few to reload and to skew."""


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key pair; the private half is wrapped."""

    kid: str
    public_jwk: Mapping[str, str]
    wrapped_private_key: bytes
    published_at: datetime
    signs_from: datetime


class State(enum.Enum):
    """Where a key stands."""

    PUBLISHED = "published"
    SIGNING = "signing"
    RETIRED = "retired"
    WITHDRAWN = "withdrawn"


def states(
    keys: Iterable[SigningKey], now: datetime, tokens_outlive: timedelta
) -> dict[str, State]:
    """Return where each key stands, by kid.

    Args:
        keys: All keys that are not withdrawn.
        now: The instant.
        tokens_outlive: How long after its last signature a token of a key may be believed.
    """
    ordered = sorted(keys, key=lambda key: (key.signs_from, key.kid))
    successors = [*ordered[1:], None]
    return {
        key.kid: _state(key, successor, now, tokens_outlive)
        for key, successor in zip(ordered, successors, strict=True)
    }


def _state(
    key: SigningKey, successor: SigningKey | None, now: datetime, tokens_outlive: timedelta
) -> State:
    if now < key.signs_from:
        return State.PUBLISHED
    if successor is None or now < successor.signs_from:
        return State.SIGNING
    if now < successor.signs_from + tokens_outlive:
        return State.RETIRED
    return State.WITHDRAWN
