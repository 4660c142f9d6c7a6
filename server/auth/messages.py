"""What the services of this slice say in the same way."""

from datetime import datetime
from typing import Final

from google.protobuf import timestamp_pb2
from kimberly.auth.v1 import auth_pb2 as pb

from server.access import Role
from server.errors import InvalidArgument

_ROLES: Final = {
    pb.ROLE_OWNER: Role.OWNER,
    pb.ROLE_ADMIN: Role.ADMIN,
    pb.ROLE_MEMBER: Role.MEMBER,
    pb.ROLE_AUDITOR: Role.AUDITOR,
}
_ENUM_VALUES: Final = {role: value for value, role in _ROLES.items()}


def role_from(asked: pb.Role.ValueType) -> Role:
    """Read a role.

    Raises:
        InvalidArgument: It is none.
    """
    if asked not in _ROLES:
        raise InvalidArgument("role", "must be one of the named roles")
    return _ROLES[asked]


def role_to(role: Role) -> pb.Role.ValueType:
    """Return a role as the API names it."""
    return _ENUM_VALUES[role]


def timestamp(instant: datetime) -> timestamp_pb2.Timestamp:
    """Return an instant as a message."""
    shown = timestamp_pb2.Timestamp()
    shown.FromDatetime(instant)
    return shown
