"""Jobs that give a user's memories vectors: which memories lack one, and under which lease."""

from collections.abc import Set
from dataclasses import dataclass
from typing import Final, NamedTuple
from uuid import UUID

from server.caller import Caller
from server.database import Connection, Database, SystemDatabase
from server.embedding_requests import FORMER_KIND, KIND, wait_for_writes
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
            limit: How many texts at most; long ones are fewer. All are for one model.
        """
        async with self._database.transaction(job.caller) as connection:
            rows = await connection.fetch(
                f"""
                SELECT model, id, content_hash, content
                  FROM (
                       SELECT *, sum(octet_length(content)) OVER (ORDER BY id) AS total
                         FROM (
                              SELECT settings.embedding_model AS model, memory.id,
                                     memory.content_hash, memory.content
                                FROM {_MISSING} AND memory.id > $3
                               ORDER BY memory.id
                               LIMIT $4
                              ) AS next
                       ) AS text
                 WHERE total - octet_length(content) < $5
                 ORDER BY id
                """,  # noqa: S608 - a constant
                job.caller.tenant_id,
                job.caller.user_id,
                after,
                limit,
                _TEXT_BYTES,
            )
        return [(Gap(row["model"], row["id"], row["content_hash"]), row["content"]) for row in rows]

    async def finish(self, job: EmbeddingJob, hopeless: Set[Gap]) -> bool:
        """Look for the last time, and hand back the key of the job if nothing is missing.

        Whatever is written later asks for a job of its own; see `server.embedding_requests`.

        Args:
            job: The job.
            hopeless: What its model knows nothing of.

        Returns:
            Whether the job is done; False: texts were written or changed meanwhile.

        Raises:
            LeaseLost: The lease passed to another worker.
        """
        async with self._database.transaction(job.caller) as connection:
            await wait_for_writes(connection, job.caller)
            rows = await connection.fetch(
                f"""
                SELECT settings.embedding_model, memory.id, memory.content_hash
                  FROM {_MISSING}
                 LIMIT $3
                """,  # noqa: S608 - a constant
                job.caller.tenant_id,
                job.caller.user_id,
                len(hopeless) + 1,
            )
            if any(Gap(*row) not in hopeless for row in rows):
                return False
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
        return True


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
