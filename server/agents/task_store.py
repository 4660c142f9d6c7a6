"""Tasks of agents in Postgres: jobs of the queue, as their user sees them.

A user's tasks take places, of which there are as many as may be under way at once. The place is
the job's unique key, so that it is the queue itself that has no room for another, also when a
job is retried.
"""

import json
from collections.abc import Mapping
from typing import Any, Final
from uuid import UUID

import asyncpg

from server import audit, consent, ids, requests
from server.access import Scope
from server.agents.model import JOBS, MOST_TASKS, NEEDED, AgentKind, Summarizing, Task
from server.caller import Caller
from server.database import Connection, Database
from server.enqueue import enqueue
from server.errors import (
    AgentDisabled,
    InvalidArgument,
    NotFound,
    QuotaExceeded,
    ScopeMissing,
    StateConflict,
)

_ATTEMPTS: Final = 3
_TASK: Final = "SELECT id, payload, state, progress, error, result, created_at, finished_at"


class TaskStore:
    """The tasks of one user's agents."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(
        self, caller: Caller, agent_id: UUID, doing: Summarizing, request_id: str, contents: bytes
    ) -> Task:
        """Give an agent a task, or return the one that an earlier request of the same id made.

        Args:
            caller: Whose agent it is.
            agent_id: The agent.
            doing: What it is to do.
            request_id: Chosen by the client; empty for none.
            contents: The request, to recognise a retry by.

        Raises:
            ConsentMissing: The user does not consent to memory.agent_access.
            InvalidArgument: The agent is of another kind.
            NotFound: There is no such agent, or it is not the caller's.
            QuotaExceeded: As many tasks are under way as may be.
            RequestIdReused: The earlier request had other contents.
            ScopeMissing: The agent is not good for what the task needs.
            StateConflict: The agent is disabled.
        """
        mark = ids.new_id()
        async with self._database.transaction(caller) as connection:
            if request_id:
                first_id = await requests.claim(
                    connection, caller, "RunAgentTask", request_id, contents, mark
                )
                if first_id != mark:
                    return await _get(connection, caller, first_id)
            await _check_agent(connection, caller, agent_id)
            await consent.require(connection, consent.MEMORY_AGENT_ACCESS)
            task = await _place(connection, caller, _payload(agent_id, doing, mark))
            if request_id:
                await requests.redirect(connection, caller, "RunAgentTask", request_id, task.id)
            await audit.record(connection, caller, "agent.run", ids.show(ids.JOB, task.id))
        return task

    async def get(self, caller: Caller, task_id: UUID) -> Task:
        """Return a task.

        Raises:
            NotFound: There is none, or it is not the caller's.
        """
        async with self._database.transaction(caller) as connection:
            return await _get(connection, caller, task_id)

    async def page(
        self, caller: Caller, agent_id: UUID, *, before: UUID | None, limit: int
    ) -> list[Task]:
        """Return tasks of an agent with ids below `before`, highest first, at most `limit`.

        Raises:
            NotFound: There is no such agent, or it is not the caller's.
        """
        async with self._database.transaction(caller) as connection:
            await _kind_of(connection, caller, agent_id)
            rows = await connection.fetch(
                f"""
                {_TASK}
                  FROM jobs
                 WHERE tenant_id = $1 AND user_id = $2 AND kind = ANY ($3)
                   AND payload ->> 'agent_id' = $4 AND id < $5
                 ORDER BY id DESC
                 LIMIT $6
                """,
                caller.tenant_id,
                caller.user_id,
                list(JOBS.values()),
                ids.show(ids.AGENT, agent_id),
                before or ids.ABOVE_ALL,
                limit,
            )
        return [_task(row) for row in rows]

    async def unfinished(self, caller: Caller, agent_id: UUID) -> list[UUID]:
        """Return the tasks of an agent that wait or run."""
        async with self._database.transaction(caller) as connection:
            rows = await connection.fetch(
                """
                SELECT id
                  FROM jobs
                 WHERE tenant_id = $1 AND user_id = $2 AND unique_key = ANY ($3)
                   AND state IN ('waiting', 'running') AND payload ->> 'agent_id' = $4
                """,
                caller.tenant_id,
                caller.user_id,
                _places(caller),
                ids.show(ids.AGENT, agent_id),
            )
        return [row["id"] for row in rows]


def _payload(agent_id: UUID, doing: Summarizing, mark: UUID) -> dict[str, Any]:
    return {
        "agent_id": ids.show(ids.AGENT, agent_id),
        "session_id": doing.session_id,
        "sentences": doing.sentences,
        # Tells the job that this call made from one that had its place already.
        "mark": mark.hex,
    }


def _places(caller: Caller) -> list[str]:
    return [f"agents/{caller.user_id}/{place}" for place in range(MOST_TASKS)]


async def _place(connection: Connection, caller: Caller, payload: Mapping[str, Any]) -> Task:
    """Enqueue a task in the first place that is free."""
    for place in _places(caller):
        job_id = await enqueue(
            connection,
            kind=JOBS[AgentKind.SUMMARIZE_SESSION],
            payload=payload,
            caller=caller,
            unique_key=place,
            max_attempts=_ATTEMPTS,
        )
        row = await _row(connection, caller, job_id)
        if row is not None and json.loads(row["payload"])["mark"] == payload["mark"]:
            return _task(row)
    raise QuotaExceeded(
        "tasks under way", MOST_TASKS, MOST_TASKS, "wait for one of them, or cancel it", "tasks"
    )


async def _check_agent(connection: Connection, caller: Caller, agent_id: UUID) -> None:
    """Refuse an agent that cannot do the task."""
    row = await _kind_of(connection, caller, agent_id)
    kind = AgentKind(row["kind"])
    if row["deleted_at"] is not None or row["disabled_at"] is not None:
        raise StateConflict(AgentDisabled().message)
    if kind not in JOBS:
        raise InvalidArgument("task", "must be of the agent's kind, which has none")
    for scope in NEEDED[kind]:
        if scope not in row["scopes"]:
            raise ScopeMissing(Scope(scope))


async def _kind_of(connection: Connection, caller: Caller, agent_id: UUID) -> asyncpg.Record:
    row = await connection.fetchrow(
        """
        SELECT kind, scopes, disabled_at, deleted_at
          FROM agents
         WHERE tenant_id = $1 AND user_id = $2 AND id = $3
        """,
        caller.tenant_id,
        caller.user_id,
        agent_id,
    )
    if row is None:
        raise NotFound("agent")
    return row


async def _get(connection: Connection, caller: Caller, task_id: UUID) -> Task:
    row = await _row(connection, caller, task_id)
    if row is None:
        raise NotFound("task")
    return _task(row)


async def _row(connection: Connection, caller: Caller, task_id: UUID) -> asyncpg.Record | None:
    return await connection.fetchrow(
        f"""
        {_TASK}
          FROM jobs
         WHERE tenant_id = $1 AND user_id = $2 AND kind = ANY ($3) AND id = $4
        """,
        caller.tenant_id,
        caller.user_id,
        list(JOBS.values()),
        task_id,
    )


def _task(row: asyncpg.Record) -> Task:
    payload = json.loads(row["payload"])
    return Task(
        id=row["id"],
        agent_id=ids.parse(ids.AGENT, payload["agent_id"], "agent_id"),
        doing=Summarizing(payload["session_id"], payload["sentences"]),
        state=row["state"],
        progress=row["progress"],
        error=row["error"],
        result=json.loads(row["result"]) if row["result"] else None,
        created_at=row["created_at"],
        finished_at=row["finished_at"],
    )
