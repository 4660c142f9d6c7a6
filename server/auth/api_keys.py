"""API keys: what they look like, and what they may be good for."""

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from server import ids
from server.access import Scope
from server.auth import refresh_tokens
from server.caller import Caller, Credentials
from server.errors import InvalidArgument

MOST_KEYS: Final = 50
GRANTABLE: Final = frozenset(scope.value for scope in Scope) - {Scope.USER, Scope.MEMORY_SENSITIVE}
"""No key is good for everything: it could make itself others, and change the password. What is
sensitive only agents are told apart by: a script sees what its user sees."""

_LONGEST_OVERLAP: Final = timedelta(days=7)
_USUAL_LIFETIME: Final = timedelta(days=90)
_LONGEST_LIFETIME: Final = timedelta(days=366)
_MARK: Final = "kim"
"""So that scanners for lost secrets can know one by its look."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as its user sees it."""

    id: UUID
    caller: Caller
    name: str
    prefix: str
    scopes: Sequence[str]
    created_at: datetime
    expires_at: datetime
    last_used_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Secret:
    """What opens a key. It is shown once; what is stored is its hash."""

    text: str
    prefix: str
    grant_id: UUID

    @classmethod
    def new(cls) -> "Secret":
        """Return one that nobody can guess."""
        prefix = f"{_MARK}_{secrets.token_hex(5)}"
        return cls(f"{prefix}_{refresh_tokens.new_token()}", prefix, ids.new_id())

    @property
    def hash(self) -> bytes:
        """What is stored of it."""
        return refresh_tokens.hash_of(self.text)


@dataclass(frozen=True, slots=True)
class Opened:
    """A key that somebody has shown a secret of."""

    key: ApiKey
    grant_id: UUID
    expires_at: datetime
    """When the key ends, or the secret if it does so earlier."""
    role: str
    """What the key's user may do in the tenant."""

    @property
    def client_id(self) -> str:
        """What the key is called as a client of OAuth 2.0: by its id, or that of its agent."""
        caller = self.key.caller
        return caller.actor if caller.agent else ids.show(ids.API_KEY, self.key.id)

    def credentials(self, asked: Iterable[str], field: str) -> Credentials:
        """Return what a token made with the secret says.

        Raises:
            InvalidArgument: The key is not good for a scope that was asked for.
        """
        scopes = frozenset(asked) or frozenset(self.key.scopes)
        if not scopes <= frozenset(self.key.scopes):
            raise InvalidArgument(field, "must be scopes of the key")
        return Credentials(self.key.caller, ids.API_KEY, self.grant_id, scopes, self.role)


def check_scopes(scopes: Sequence[str], field: str) -> list[str]:
    """Return the scopes of a new key, each once.

    Raises:
        InvalidArgument: There is none, or one that no key can have.
    """
    if not scopes:
        raise InvalidArgument(field, "must name at least one scope")
    if not GRANTABLE.issuperset(scopes):
        raise InvalidArgument(field, f"must be among {', '.join(sorted(GRANTABLE))}")
    return sorted(set(scopes))


def check_overlap(overlap: timedelta, field: str) -> timedelta:
    """Return for how long an old secret stays good beside a new one.

    Raises:
        InvalidArgument: That is negative, or over a week.
    """
    if not timedelta(0) <= overlap <= _LONGEST_OVERLAP:
        raise InvalidArgument(field, f"must be at most {_LONGEST_OVERLAP.days} days")
    return overlap


def check_expiry(expires_at: datetime | None, field: str, now: datetime) -> datetime:
    """Return when a new key ends.

    Raises:
        InvalidArgument: It would have ended already, or live for more than a year.
    """
    if expires_at is None:
        return now + _USUAL_LIFETIME
    if not now < expires_at <= now + _LONGEST_LIFETIME:
        raise InvalidArgument(field, f"must be in the next {_LONGEST_LIFETIME.days} days")
    return expires_at
