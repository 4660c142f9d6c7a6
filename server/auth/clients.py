"""What a call says of the client that makes it."""

from typing import Any, Final, TypeAlias

import grpc

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_LONGEST_NAME: Final = 200


def name_of(context: Context) -> str:
    """Return what the client calls itself. Anybody can say anything; control characters go."""
    said = dict(context.invocation_metadata() or ()).get("user-agent", "")
    if not isinstance(said, str):
        return ""
    return "".join(character for character in said if character.isprintable())[:_LONGEST_NAME]
