"""Jobs that give a user's memories vectors: which memories lack one, and under which lease."""

import enum
from collections.abc import Set
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple
from uuid import UUID

from server import audit
from server.caller import Caller
from server.database import Connection, Database, SystemDatabase
from server.embedding_requests import (
    FORMER_KIND,
    KIND,
    ask_for_embedding_later,
    wait_for_writes,
)
from server.errors import LeaseLost, NotFound

START: Final = UUID(int=0)
"""Where to begin to read: before every memory."""

_TEXT_BYTES: Final = 1024 * 1024
"""How much text a batch may hold: one gRPC message has 4 MiB."""

# No model sees what is sensitive, and nobody finds what is archived. What a user who withdrew the
# choice or a consent wants nothing of is not missing.
_MISSING: Final = """
    settings
    JOIN memories AS memory
      ON memory.tenant_id = settings.tenant_id AND memory.user_id = settings.user_id
   WHERE settings.tenant_id = $1 AND settings.user_id = $2 AND settings.embedding_model <> ''
     AND consented('memory.store') AND consented('memory.embed')
     AND NOT memory.sensitive AND memory.archived_at IS NULL
     AND NOT EXISTS (
         SELECT FROM embeddings AS embedding
          WHERE embedding.tenant_id = $1 AND embedding.user_id = $2
            AND embedding.model = settings.embedding_model
            AND embedding.memory_id = memory.id
            AND embedding.content_hash = memory.content_hash
         )
"""


@dataclass(frozen=True, slots=True)
class EmbeddingJob:
    """A job under a lease."""

    id: UUID
    lease_token: int
    caller: Caller
    """Whose memories get vectors."""


class Gap(NamedTuple):
    """A text of which there is no vector of a model."""

    model: str
    memory_id: UUID
    content_hash: bytes


# A new vector takes the place of that of an earlier text: it needs no room.
_FITTING: Final = f"""
    {_MISSING}
     AND ($3 OR EXISTS (
         SELECT FROM embeddings AS former
          WHERE former.tenant_id = $1 AND former.user_id = $2
            AND former.model = settings.embedding_model AND former.memory_id = memory.id
         ))
"""


class Bound(enum.Enum):
    """What of a plan a job has met."""

    MADE_IN_MONTH = "made in month"
    """How many vectors a local model makes in a month."""
    KEPT = "kept"
    """How many vectors a user keeps."""


@dataclass(frozen=True, slots=True)
class Rest:
    """What a job leaves to another one."""

    bound: Bound
    """Why."""
    texts: int
    """How many lack a vector."""
    resumes_at: datetime
    """When the other job looks at them."""


@dataclass(frozen=True, slots=True)
class Finish:
    """What came of looking for the last time."""

    is_done: bool = True
    """Whether the job is; otherwise texts were written or changed meanwhile."""
    rest: Rest | None = None


class _Allowance(NamedTuple):
    """What a plan allows for now."""

    to_make: int
    """Vectors."""
    to_keep: int
    """Vectors beside those that are kept."""


class EmbeddingJobs:
    """Sees one user's memories at a time, as that user: only those of leased jobs."""

    def __init__(self, database: Database, system: SystemDatabase) -> None:
        """Serve jobs.

        Args:
            database: Where a job's user sees their own rows.
            system: Tells whose a job is.
        """
        self._database = database
        self._system = system

    async def open(self, job_id: UUID, lease_token: int) -> EmbeddingJob:
        """Return a job that is under a lease.

        Raises:
            NotFound: There is no such job.
            LeaseLost: It is not under this lease.
        """
        async with self._system.transaction() as connection:
            row = await connection.fetchrow(
                """
                SELECT tenant_id, user_id, state = 'running' AND lease_token = $3 AS is_leased
                  FROM jobs
                 WHERE id = $1 AND kind = ANY ($2) AND user_id IS NOT NULL
                """,
                job_id,
                (KIND, FORMER_KIND),
                lease_token,
            )
        if row is None:
            raise NotFound("job")
        if not row["is_leased"]:
            raise LeaseLost
        return EmbeddingJob(job_id, lease_token, Caller(row["tenant_id"], row["user_id"]))

    async def read(self, job: EmbeddingJob, after: UUID, limit: int) -> list[tuple[Gap, str]]:
        """Return the next texts that lack a vector, in the order of their memories.

        Args:
            job: Whose user's memories are read.
            after: Memory to go on after.
            limit: How many texts at most; long ones are fewer, and those beyond what the user's
                plan allows are left out. All are for one model.
        """
        async with self._database.transaction(job.caller) as connection:
            allowed = await _allowed(connection, job.caller)
            rows = await connection.fetch(
                f"""
                SELECT model, id, content_hash, content
                  FROM (
                       SELECT *, sum(octet_length(content)) OVER (ORDER BY id) AS total
                         FROM (
                              SELECT settings.embedding_model AS model, memory.id,
                                     memory.content_hash, memory.content
                                FROM {_FITTING} AND memory.id > $4
                               ORDER BY memory.id
                               LIMIT $5
                              ) AS next
                       ) AS text
                 WHERE total - octet_length(content) < $6
                 ORDER BY id
                """,  # noqa: S608 - a constant
                job.caller.tenant_id,
                job.caller.user_id,
                allowed.to_keep > 0,
                after,
                min(limit, allowed.to_make, allowed.to_keep or limit),
                _TEXT_BYTES,
            )
        return [(Gap(row["model"], row["id"], row["content_hash"]), row["content"]) for row in rows]

    async def finish(self, job: EmbeddingJob, hopeless: Set[Gap]) -> Finish:
        """Look for the last time, and hand back the key of the job if there is no more to do now.

        Whatever is written later asks for a job of its own; see `server.embedding_requests`. What
        the budget of the month did not suffice for gets one that runs when the next month begins;
        what there was no room for, one that looks again a day later.

        Args:
            job: The job.
            hopeless: What its model knows nothing of.

        Raises:
            LeaseLost: The lease passed to another worker.
        """
        async with self._database.transaction(job.caller) as connection:
            await wait_for_writes(connection, job.caller)
            allowed = await _allowed(connection, job.caller)
            rows = await connection.fetch(
                f"""
                SELECT settings.embedding_model, memory.id, memory.content_hash
                  FROM {_FITTING}
                 LIMIT $4
                """,  # noqa: S608 - a constant
                job.caller.tenant_id,
                job.caller.user_id,
                allowed.to_keep > 0,
                len(hopeless) + 1,
            )
            if allowed.to_make and any(Gap(*row) not in hopeless for row in rows):
                return Finish(is_done=False)
            await _release(connection, job)
            return Finish(rest=await _leave(connection, job, allowed, hopeless))


async def hold(connection: Connection, job: EmbeddingJob, model: str) -> bool:
    """Keep lease and choice as they are until the commit.

    Returns:
        Whether the user still chooses the model.

    Raises:
        LeaseLost: The lease passed to another worker.
    """
    held = await connection.fetchval(
        """
        SELECT true
          FROM jobs
         WHERE id = $1 AND lease_token = $2 AND state = 'running'
           FOR SHARE
        """,
        job.id,
        job.lease_token,
    )
    if not held:
        raise LeaseLost
    chosen: str = await connection.fetchval(
        """
        SELECT embedding_model
          FROM settings
         WHERE tenant_id = $1 AND user_id = $2
           FOR SHARE
        """,
        job.caller.tenant_id,
        job.caller.user_id,
    )
    return chosen == model


async def spend(connection: Connection, caller: Caller, vectors: int) -> None:
    """Count vectors that a local model made, to be committed with them."""
    await connection.execute(
        """
        INSERT INTO usage_by_month AS usage (tenant_id, user_id, month, embeddings)
        VALUES ($1, $2, this_month(), $3)
            ON CONFLICT (user_id, tenant_id, month) DO UPDATE
           SET embeddings = usage.embeddings + excluded.embeddings
        """,
        caller.tenant_id,
        caller.user_id,
        vectors,
    )


async def _allowed(connection: Connection, caller: Caller) -> _Allowance:
    row = await connection.fetchrow(
        """
        SELECT embeddings_left($1, $2) AS to_make,
               greatest((SELECT vectors FROM quotas_of($1, $2))
                        - (SELECT count(*)
                             FROM embeddings
                            WHERE tenant_id = $1 AND user_id = $2), 0) AS to_keep
        """,
        caller.tenant_id,
        caller.user_id,
    )
    return _Allowance(**row)


async def _release(connection: Connection, job: EmbeddingJob) -> None:
    released = await connection.fetchval(
        """
        UPDATE jobs SET unique_key = NULL
         WHERE id = $1 AND lease_token = $2 AND state = 'running'
        RETURNING true
        """,
        job.id,
        job.lease_token,
    )
    if not released:
        raise LeaseLost


async def _leave(
    connection: Connection, job: EmbeddingJob, allowed: _Allowance, hopeless: Set[Gap]
) -> Rest | None:
    """Ask for a job for what still lacks a vector, unless that is nothing but what is hopeless."""
    models, memory_ids, hashes = zip(*hopeless, strict=True) if hopeless else ((), (), ())
    texts: int = await connection.fetchval(
        f"""
        SELECT count(*)
          FROM {_MISSING}
           AND (settings.embedding_model, memory.id, memory.content_hash) NOT IN (
               SELECT * FROM unnest($3::text[], $4::uuid[], $5::bytea[]))
        """,  # noqa: S608 - a constant
        job.caller.tenant_id,
        job.caller.user_id,
        models,
        memory_ids,
        hashes,
    )
    if not texts:
        return None
    bound = Bound.KEPT if allowed.to_make else Bound.MADE_IN_MONTH
    return Rest(bound, texts, await _postpone(connection, job, bound))


async def _postpone(connection: Connection, job: EmbeddingJob, bound: Bound) -> datetime:
    """Ask for a job for when there may be more allowed.

    As the next month begins, of which the audit log is told; or tomorrow: who deletes vectors
    tells nobody what they make room for.
    """
    is_month = bound is Bound.MADE_IN_MONTH
    resumes_at: datetime = await connection.fetchval(
        """
        SELECT CASE WHEN $1 THEN (this_month() + interval '1 month') AT TIME ZONE 'UTC'
                    ELSE now() + interval '1 day' END
        """,
        is_month,
    )
    await ask_for_embedding_later(connection, job.caller, resumes_at)
    if is_month:
        resource = "usage/embeddings/100"
        await audit.record_all(
            connection, job.caller, "quota.threshold", [resource], actor=audit.SYSTEM
        )
    return resumes_at
