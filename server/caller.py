"""Who is calling."""

from contextvars import ContextVar
from dataclasses import dataclass
from uuid import UUID

from server.errors import Unauthenticated


@dataclass(frozen=True, slots=True)
class Caller:
    """A user inside a tenant, as a verified access token names them."""

    tenant_id: UUID
    user_id: UUID


_current: ContextVar[Caller | None] = ContextVar("caller", default=None)


def current_caller() -> Caller:
    """Return the user whose call is being served.

    Raises:
        Unauthenticated: The call carries no user.
    """
    caller = _current.get()
    if caller is None:
        raise Unauthenticated("this call needs an access token")
    return caller


def set_caller(caller: Caller | None) -> None:
    """Say whose call is being served, for the rest of the current task."""
    _current.set(caller)
