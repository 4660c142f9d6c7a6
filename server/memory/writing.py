"""What a transaction needs before it writes memories, and how the database refuses it."""

import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final, TypeVar
from uuid import UUID

import asyncpg

from server import consent
from server.caller import Caller
from server.database import Connection
from server.errors import (
    ConsentMissing,
    EtagMismatch,
    NotFound,
    QuotaExceeded,
    StoreUnavailable,
)
from server.memory.conversation import Place
from server.memory.metrics import QUOTA_REFUSALS
from server.preferences import Language

_OVER_QUOTA: Final = "KM001"
"""What the function count_usage raises."""

_TRIES: Final = 5

T = TypeVar("T")


class Overtaken(Exception):
    """A memory with the same text came or went after this transaction had looked for it."""


async def until_settled(store: Callable[[], Awaitable[T]]) -> T:
    """Run a transaction anew as often as another call overtakes it.

    Raises:
        StoreUnavailable: It was overtaken every time.
    """
    for _ in range(_TRIES):
        with suppress(Overtaken):
            return await store()
    raise StoreUnavailable("a memory that others keep changing")


@dataclass(frozen=True, slots=True)
class Writing:
    """Under which conditions a user's memories are written."""

    consent_version: int
    """Of the consent to memory.store that stands."""
    language: Language
    wants_vectors: bool
    """Whether a local model makes vectors of what the user writes."""


async def begin_writing(connection: Connection) -> Writing:
    """Return the conditions that hold until this transaction ends, in one statement.

    Raises:
        ConsentMissing: The user has not consented to memory.store.
    """
    row = await connection.fetchrow(
        """
        SELECT consent_version($1) AS consent_version, language_to_write_in() AS language,
               wants_embedding() AS wants_vectors
        """,
        consent.MEMORY_STORE,
    )
    if row["consent_version"] is None:
        raise ConsentMissing(consent.MEMORY_STORE)
    return Writing(row["consent_version"], Language(row["language"]), row["wants_vectors"])


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a stored memory stands, which never changes, and the language it is read in."""

    place: Place | None
    language: Language

    @property
    def places(self) -> list[Place]:
        """Its place, if it is a turn of a conversation."""
        return [self.place] if self.place else []


async def standing_of(connection: Connection, caller: Caller, memory_id: UUID) -> Standing:
    """Return where a memory stands, without locking it: its conversation is locked first.

    Raises:
        NotFound: There is none, or it is not the caller's.
    """
    row = await connection.fetchrow(
        """
        SELECT session_id, session_position,
               language_to_write_in() AS language
          FROM memories
         WHERE tenant_id = $1 AND user_id = $2 AND id = $3
        """,
        caller.tenant_id,
        caller.user_id,
        memory_id,
    )
    if row is None:
        raise NotFound("memory")
    position = row["session_position"]
    return Standing(
        None if position is None else Place(row["session_id"], position),
        Language(row["language"]),
    )


async def lock_memory(
    connection: Connection, caller: Caller, memory_id: UUID, expected_version: int | None
) -> asyncpg.Record:
    """Lock a memory against other writers and return what changes may depend on.

    Raises:
        NotFound: There is none, or it is not the caller's.
        EtagMismatch: It is no longer at the expected version.
    """
    row = await connection.fetchrow(
        """
        SELECT content, tags, version, tier, protected, archived_at, scope, sensitive, sealed
          FROM memories
         WHERE tenant_id = $1 AND user_id = $2 AND id = $3
           FOR NO KEY UPDATE
        """,
        caller.tenant_id,
        caller.user_id,
        memory_id,
    )
    if row is None:
        raise NotFound("memory")
    if expected_version not in (None, row["version"]):
        raise EtagMismatch
    return row


async def touch(connection: Connection, caller: Caller) -> None:
    """Note that queries may be answered otherwise once this transaction has committed."""
    await connection.execute(
        "SELECT count_usage($1, $2, 0, 0, 0, 0, 0, 0)", caller.tenant_id, caller.user_id
    )


@contextmanager
def within_quota() -> Iterator[None]:
    """Say in our words that the database refused a write for want of room.

    Raises:
        QuotaExceeded: What is written does not fit into its tier.
    """
    try:
        yield
    except asyncpg.PostgresError as error:
        if error.sqlstate != _OVER_QUOTA:
            raise
        refusal = json.loads(error.detail)
        QUOTA_REFUSALS.labels(refusal["tier"]).inc()
        raise QuotaExceeded(
            refusal["tier"],
            refusal["used"],
            refusal["limit"],
            "delete or archive memories, or choose a larger plan",
            room=refusal["room"],
        ) from error
