"""Tasks of agents: whose memories a leased job may see, and the turns that it is about."""

import json
from dataclasses import dataclass
from typing import Final, NamedTuple
from uuid import UUID

from server.access import Scope
from server.caller import ActingAgent, Caller
from server.database import Database, SystemDatabase
from server.errors import LeaseLost, NotFound, ScopeMissing
from server.memory.model import Memory
from server.memory.rows import MEMORY_COLUMNS, SCORE_COLUMNS, memory_from

SUMMARIZE: Final = "agents.summarize_session"
"""The kind of job that summarises a conversation."""
_PAGE: Final = 100
_PAGE_BYTES: Final = 1024 * 1024
"""How much text a page may hold before its last turn: one gRPC message has 4 MiB."""
_PREFIX: Final = len("agt_")


class Place(NamedTuple):
    """Where a turn stands; ids tell those apart that say the same place."""

    position: int = -1
    memory_id: UUID = UUID(int=0)


@dataclass(frozen=True, slots=True)
class AgentJob:
    """A job under a lease."""

    id: UUID
    caller: Caller
    """Whose conversation it is, and the agent that acts for them."""
    scopes: frozenset[str]
    session_id: str
    sentences: int

    def check(self, scope: Scope) -> None:
        """Refuse what the agent is not good for.

        Raises:
            ScopeMissing: It lacks the scope.
        """
        if scope not in self.scopes:
            raise ScopeMissing(scope)


class AgentJobs:
    """Sees one user's memories at a time, as their agent does: only those of leased jobs."""

    def __init__(self, database: Database, system: SystemDatabase) -> None:
        """Serve jobs.

        Args:
            database: Where agents see what their users let them.
            system: Tells whose a job is.
        """
        self._database = database
        self._system = system

    async def open(self, job_id: UUID, lease_token: int) -> AgentJob:
        """Return a job that is under a lease.

        Raises:
            NotFound: There is no such job, or its agent is gone with its user.
            LeaseLost: It is not under this lease.
        """
        async with self._system.transaction() as connection:
            row = await connection.fetchrow(
                """
                SELECT job.tenant_id, job.user_id, job.payload, agent.id, agent.scopes,
                       job.state = 'running' AND job.lease_token = $3 AS is_leased
                  FROM jobs AS job
                  JOIN agents AS agent
                    ON agent.tenant_id = job.tenant_id AND agent.user_id = job.user_id
                   AND agent.id = substr(job.payload ->> 'agent_id', $4 + 1)::uuid
                 WHERE job.id = $1 AND job.kind = $2
                """,
                job_id,
                SUMMARIZE,
                lease_token,
                _PREFIX,
            )
        if row is None:
            raise NotFound("job")
        if not row["is_leased"]:
            raise LeaseLost
        scopes, payload = frozenset[str](row["scopes"]), json.loads(row["payload"])
        agent = ActingAgent(row["id"], sees_sensitive=Scope.MEMORY_SENSITIVE in scopes)
        caller = Caller(row["tenant_id"], row["user_id"], agent)
        return AgentJob(job_id, caller, scopes, payload["session_id"], payload["sentences"])

    async def durable(self, job: AgentJob, after: Place) -> list[Memory]:
        """Return the next durable turns in their order, some hundred at most."""
        rows = await self._database.fetch(
            job.caller,
            f"""
            SELECT *
              FROM (
                   SELECT *, sum(size_bytes) OVER (ORDER BY session_position, id) AS total
                     FROM (
                          SELECT {MEMORY_COLUMNS}, {SCORE_COLUMNS}
                            FROM memories AS memory
                            JOIN memory_scores AS scores
                              ON scores.user_id = memory.user_id
                             AND scores.memory_id = memory.id
                           WHERE memory.tenant_id = caller.tenant_id
                             AND memory.user_id = caller.user_id AND session_id = $3
                             AND session_position IS NOT NULL AND archived_at IS NULL
                             AND (session_position, id) > ($4, $5)
                           ORDER BY session_position, id
                           LIMIT $6
                          ) AS next
                   ) AS turn
             WHERE total - size_bytes < $7
             ORDER BY session_position, id
            """,  # noqa: S608 - constants
            job.session_id,
            after.position,
            after.memory_id,
            _PAGE,
            _PAGE_BYTES,
        )
        return [memory_from(row) for row in rows]

    async def count_durable(self, job: AgentJob) -> int:
        """Return how many durable turns there are."""
        (row,) = await self._database.fetch(
            job.caller,
            """
            SELECT count(*) AS turns
              FROM memories
             WHERE tenant_id = caller.tenant_id AND user_id = caller.user_id
               AND session_id = $3 AND session_position IS NOT NULL AND archived_at IS NULL
            """,
            job.session_id,
        )
        turns: int = row["turns"]
        return turns
