"""Who is calling, and what they were given to call with."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from uuid import UUID

from server import ids
from server.errors import Unauthenticated


@dataclass(frozen=True, slots=True)
class ActingAgent:
    """An agent that acts for a user, as it is known from a token or a task."""

    id: UUID
    sees_sensitive: bool = False


@dataclass(frozen=True, slots=True)
class Caller:
    """A user inside a tenant, as a verified access token names them."""

    tenant_id: UUID
    user_id: UUID
    agent: ActingAgent | None = field(default=None, compare=False, repr=False)
    """Who acts for the user; None: the user. Whose data it is does not depend on it."""

    @property
    def actor(self) -> str:
        """Who acts, as the audit log names them."""
        if self.agent is None:
            return ids.show(ids.USER, self.user_id)
        return ids.show(ids.AGENT, self.agent.id)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What an access token says: whom it names, where it comes from, and what it is good for."""

    caller: Caller
    grant_kind: str
    """ids.SESSION or ids.API_KEY."""
    grant_id: UUID
    """The session or API key that it descends from, and ends with."""
    scopes: frozenset[str]
    """Values of server.access.Scope. Whoever reads a token leaves others in: they open nothing."""
    role: str = "member"
    """A value of server.access.Role: what the user may do in the tenant."""


_current: ContextVar[Credentials | None] = ContextVar("credentials", default=None)


def current_credentials() -> Credentials:
    """Return what the call that is being served was made with.

    Raises:
        Unauthenticated: The call carries no user.
    """
    credentials = _current.get()
    if credentials is None:
        raise Unauthenticated("this call needs an access token")
    return credentials


def current_caller() -> Caller:
    """Return the user whose call is being served.

    Raises:
        Unauthenticated: The call carries no user.
    """
    return current_credentials().caller


def set_credentials(credentials: Credentials | None) -> None:
    """Say whose call is being served, for the rest of the current task."""
    _current.set(credentials)
