"""Refresh tokens: random, used once, and a second use gives the thief away.

The tokens of a session form generations: using one of generation n makes one of n + 1. Each
generation may be used once. Within a short grace it may be used a few times more, because
clients click twice and repeat calls whose answer was lost; the successors are all of the next
generation, of which again one is used. A use outside of that means that two parties hold tokens
of one session, and as nobody can tell which is the thief, the session ends for both.
"""

import enum
import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from server.caller import Caller

GRACE: Final = timedelta(seconds=10)
MOST_REPEATS: Final = 4
"""Double clicks come in pairs; dozens of concurrent uses are somebody at work."""

_TOKEN_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Session:
    """A log-in: everything that descends from it ends with it."""

    id: UUID
    caller: Caller
    expires_at: datetime
    client_name: str = ""
    """What the client that logged in called itself."""
    role: str = "owner"
    """What the user may do in the tenant, as of now."""


@dataclass(frozen=True, slots=True)
class Presented:
    """A refresh token that someone shows, and where its session stands."""

    session: Session
    generation: int
    used_generation: int
    used_at: datetime | None
    repeats: int
    has_ended: bool


class Verdict(enum.Enum):
    """What comes of showing a refresh token."""

    USE = "use"
    """The first use of its generation: it gets a successor."""

    REPEAT = "repeat"
    """Another use within the grace: it gets a successor, too."""

    REFUSE = "refuse"
    """The session is over; nothing changes."""

    REVOKE = "revoke"
    """A token was used twice: the session ends here."""


def judge(presented: Presented, now: datetime) -> Verdict:
    """Decide what comes of showing a refresh token at an instant."""
    if presented.has_ended or now >= presented.session.expires_at:
        return Verdict.REFUSE
    if presented.generation > presented.used_generation:
        return Verdict.USE
    if presented.generation == presented.used_generation and _is_double_click(presented, now):
        return Verdict.REPEAT
    return Verdict.REVOKE


def _is_double_click(presented: Presented, now: datetime) -> bool:
    if presented.used_at is None or presented.repeats >= MOST_REPEATS:
        return False
    return now - presented.used_at <= GRACE


def new_token() -> str:
    """Return a token that nobody can guess."""
    return secrets.token_urlsafe(_TOKEN_BYTES)


def hash_of(token: str) -> bytes:
    """Return what is stored of a token. Random tokens need no salt and no slow hash."""
    return hashlib.sha256(token.encode()).digest()
