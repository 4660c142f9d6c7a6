"""What a call says of the client that makes it."""

from typing import Any, Final, TypeAlias

import grpc

from server.auth import throttling

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_LONGEST_NAME: Final = 200


def name_of(context: Context) -> str:
    """Return what the client calls itself. Anybody can say anything; control characters go."""
    said = _metadata(context, "user-agent")
    return "".join(character for character in said if character.isprintable())[:_LONGEST_NAME]


def place_of(context: Context) -> str:
    """Return where the client is, as the edge saw it: it removes what a client says of that."""
    return throttling.place_of(_metadata(context, "x-forwarded-for").rpartition(",")[2].strip())


def _metadata(context: Context, name: str) -> str:
    found = dict(context.invocation_metadata() or ()).get(name, "")
    return found if isinstance(found, str) else ""
