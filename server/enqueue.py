"""Asking for work: a job is enqueued in the transaction of the change that causes it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from server import ids, tracing
from server.caller import Caller
from server.database import Connection

DOORBELL: Final = "jobs"
"""Channel that is notified when a transaction that enqueued a job has committed."""

USUAL_ATTEMPTS: Final = 5

_TRIES = 5


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to be enqueued."""

    kind: str
    """What is to be done, such as "meditation.shard"."""
    payload: Mapping[str, Any] = field(default_factory=dict)
    """The particulars, as a JSON object. No memory text: jobs outlive memories."""
    unique_key: str | None = None
    """At most one unfinished job has it."""
    run_at: datetime | None = None
    """Not before; None for at once."""
    priority: int = 0
    """Greater comes first, whosever it is; -1000 to 1000."""
    max_attempts: int = USUAL_ATTEMPTS


async def enqueue(
    connection: Connection,
    *,
    kind: str,
    payload: Mapping[str, Any],
    caller: Caller | None = None,
    unique_key: str | None = None,
    run_at: datetime | None = None,
    priority: int = 0,
    max_attempts: int = USUAL_ATTEMPTS,
) -> UUID:
    """Enqueue a job, to be committed with the change that causes it.

    Args:
        connection: The transaction of the change.
        kind: What is to be done.
        payload: The particulars, as a JSON object.
        caller: Whose job it is; None for the system's own, which only the system role can make.
        unique_key: At most one unfinished job has it.
        run_at: Not before; None for at once.
        priority: Greater comes first, whosever it is; -1000 to 1000.
        max_attempts: How often it may be leased before it is given up.

    Returns:
        Id of the job, or of the unfinished one that has the unique key.
    """
    job = NewJob(kind, payload, unique_key, run_at, priority, max_attempts)
    (job_id,) = await enqueue_all(connection, [job], caller=caller)
    return job_id


async def enqueue_all(
    connection: Connection, jobs: Sequence[NewJob], *, caller: Caller | None = None
) -> list[UUID]:
    """Enqueue many jobs in one statement and return their ids, in order; as `enqueue` does."""
    found: dict[int, UUID] = {}
    for _ in range(_TRIES):
        missing = [index for index in range(len(jobs)) if index not in found]
        if not missing:
            break
        found |= await _insert(connection, [(index, jobs[index]) for index in missing], caller)
    return [found[index] for index in range(len(jobs))]


async def _insert(
    connection: Connection, jobs: Sequence[tuple[int, NewJob]], caller: Caller | None
) -> dict[int, UUID]:
    """Insert what is not there and return ids by index.

    A job whose namesake finished between the two statements is in neither answer.
    """
    new = {ids.new_id(): (index, job) for index, job in jobs}
    inserted = await connection.fetch(
        f"""
        WITH inserted AS (
            INSERT INTO jobs (id, tenant_id, user_id, kind, priority, run_at, due, max_attempts,
                              payload, unique_key, trace)
            SELECT job.id, $8, $9, job.kind, job.priority, coalesce(job.run_at, now()),
                   coalesce(job.run_at <= now(), true), job.max_attempts, job.payload,
                   job.unique_key, $10
              FROM unnest($1::uuid[], $2::text[], $3::smallint[], $4::timestamptz[],
                          $5::integer[], $6::jsonb[], $7::text[])
                   AS job (id, kind, priority, run_at, max_attempts, payload, unique_key)
            -- The index holds jobs without a key, too. A release from now it may leave them out,
            -- since this finds either; the code before did not.
            ON CONFLICT (unique_key)
                WHERE unique_key IS NOT NULL AND state IN ('waiting', 'running') DO NOTHING
            RETURNING id
        )
        SELECT id, pg_notify('{DOORBELL}', '') FROM inserted
        """,  # noqa: S608 - a constant
        list(new),
        [job.kind for _, job in new.values()],
        [job.priority for _, job in new.values()],
        [job.run_at for _, job in new.values()],
        [job.max_attempts for _, job in new.values()],
        [json.dumps(job.payload) for _, job in new.values()],
        [job.unique_key for _, job in new.values()],
        caller.tenant_id if caller else None,
        caller.user_id if caller else None,
        tracing.traceparent(),
    )
    found = {new[row["id"]][0]: row["id"] for row in inserted}
    namesakes = {
        index: job.unique_key
        for index, job in new.values()
        if job.unique_key and index not in found
    }
    return found | await _unfinished(connection, namesakes)


async def _unfinished(connection: Connection, unique_keys: Mapping[int, str]) -> dict[int, UUID]:
    """Return ids by index."""
    if not unique_keys:
        return {}
    rows = await connection.fetch(
        """
        SELECT id, unique_key
          FROM jobs
         WHERE unique_key = ANY ($1) AND state IN ('waiting', 'running')
        """,
        list(set(unique_keys.values())),
    )
    found = {row["unique_key"]: row["id"] for row in rows}
    return {index: found[key] for index, key in unique_keys.items() if key in found}
