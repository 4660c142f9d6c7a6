"""What users may ask for: kinds of job, and how each comes about."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Final
from uuid import UUID

from server.caller import Caller
from server.database import Connection
from server.embedding_requests import KIND as EMBED
from server.embedding_requests import ask_for_embedding
from server.errors import InvalidArgument

Ask = Callable[[Connection, Caller], Awaitable[UUID | None]]

_KINDS: Final[Mapping[str, Ask]] = {EMBED: ask_for_embedding}


def check_kind(kind: str) -> None:
    """Refuse what users may not ask for.

    Raises:
        InvalidArgument: It is no kind of job that users may ask for.
    """
    if kind not in _KINDS:
        raise InvalidArgument("kind", f"must be one of {', '.join(_KINDS)}")


async def ask(connection: Connection, caller: Caller, kind: str) -> UUID | None:
    """Enqueue a job in the caller's transaction.

    Args:
        connection: The transaction.
        caller: Whose job it is.
        kind: A kind that `check_kind` let pass.

    Returns:
        Id of the job, or of the unfinished one of the same purpose; None if the user's settings
        and consents rule it out.
    """
    return await _KINDS[kind](connection, caller)
