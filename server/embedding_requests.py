"""Asking for vectors: users who chose a local model get a job when memories may lack some.

At most one unfinished job of a user has the key. Nothing that is written falls between two jobs,
because one lock orders writes and whoever looks at what they leave behind:

- A write takes the lock shared, then looks whether the user chose a model. It keeps the lock
  until it has committed.
- A choice of a model, and a consent, take it alone: writes that did not see the choice have
  committed before the job that follows from it can start.
- A job takes it alone to look for the last time and to hand its key back: what was written
  before is seen, and what is written later finds no job of the key and asks for another one.
"""

from datetime import datetime
from typing import Final
from uuid import UUID

from server.caller import Caller
from server.database import Connection
from server.enqueue import DOORBELL, enqueue

KIND: Final = "embedding.batch"
FORMER_KIND: Final = "memories.embed"
"""What the kind was called before migration 0041. For one release jobs, workers and callers that
still say so are served: they are of processes that are yet to be replaced."""


async def ask_for_embedding(connection: Connection, caller: Caller) -> UUID | None:
    """Enqueue the job that gives memories their vectors, if the user wants that.

    Does nothing for users who chose no local model or have not consented. To be called last in
    the transaction: it waits for nobody who could wait for what the transaction holds.

    Args:
        connection: A transaction of the caller's that adds memories, changes their texts or
            brings them back, or changes whether they may have vectors.
        caller: Whose memories they are.

    Returns:
        Id of the job, or of the unfinished one; None if the user does not want it.
    """
    if not await connection.fetchval("SELECT wants_embedding()"):
        return None
    return await enqueue(connection, kind=KIND, payload={}, caller=caller, unique_key=_key(caller))


async def ask_for_embedding_later(connection: Connection, caller: Caller, run_at: datetime) -> UUID:
    """Enqueue the job for when there is a budget again. Until then, whoever asks gets this one."""
    return await enqueue(
        connection,
        kind=KIND,
        payload={},
        caller=caller,
        unique_key=_key(caller),
        run_at=run_at,
    )


async def hasten_embedding(connection: Connection, caller: Caller) -> None:
    """Have a job that waits for its time run now: there may be a budget after all.

    Args:
        connection: A transaction of the system role.
        caller: Whose job it is.
    """
    await connection.execute(
        """
        WITH hastened AS (
            UPDATE jobs SET run_at = now(), due = true
             WHERE tenant_id = $1 AND user_id = $2 AND unique_key = $3
               AND state = 'waiting' AND NOT due
            RETURNING id
        )
        SELECT pg_notify($4, '') FROM hastened
        """,
        caller.tenant_id,
        caller.user_id,
        _key(caller),
        DOORBELL,
    )


async def wait_for_writes(connection: Connection, caller: Caller) -> None:
    """Wait until no write of the user's is under way, and let none ask until the commit."""
    await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", _key(caller))


def _key(caller: Caller) -> str:
    """Return the unique key of the user's job; the lock has the same name.

    Both outlive the name of the kind: processes of two releases must meet at them.
    """
    return f"memories.embed/{caller.user_id}"
