"""The people of a tenant: what they are, and who may make them something else."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from server.access import Role
from server.caller import Caller


@dataclass(frozen=True, slots=True)
class Member:
    """Somebody of a tenant."""

    user_id: UUID
    email: str
    display_name: str
    role: Role
    joined_at: datetime
    email_verified: bool
    disabled_at: datetime | None
    is_home: bool
    """Whether their account is at home in the tenant."""


@dataclass(frozen=True, slots=True)
class Membership:
    """What somebody is in one of their tenants."""

    caller: Caller
    role: Role
    joined_at: datetime
    is_home: bool
    disabled_at: datetime | None


@dataclass(frozen=True, slots=True)
class Invitation:
    """A question to join a tenant."""

    id: UUID
    email: str
    role: Role
    inviter_id: UUID
    created_at: datetime
    expires_at: datetime


def may_change(actor: Role, member: Role, becoming: Role | None = None) -> bool:
    """Tell whether somebody may change a member, or give them a role.

    Owners may do everything; admins whatever has nothing to do with owners; others nothing.
    """
    if actor is Role.OWNER:
        return True
    return actor is Role.ADMIN and Role.OWNER not in {member, becoming}
