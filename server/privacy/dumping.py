"""Rows of a user as JSON Lines: which tables an export holds, and how they are read."""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from server import ids
from server.caller import Caller
from server.database import Connection, Database, SystemDatabase

_PAGE: Final = 500


@dataclass(frozen=True, slots=True)
class Dump:
    """How the rows of a table are read."""

    key: Mapping[str, str]
    """Columns that tell a user's rows apart, with their types; rows come in order of them."""
    without: Sequence[str] = ()
    """Columns that say nothing about the user."""
    ids: Mapping[str, str] | None = None
    """Columns that are shown as the API shows ids, with their prefixes."""
    owner_column: str = "user_id"
    is_behind_wall: bool = False
    """Whether only the system role reads it."""


_BY_ID: Final = {"id": "uuid"}

DUMPS: Final[Mapping[str, Dump]] = {
    "users": Dump(
        _BY_ID,
        without=("version",),
        ids={"id": ids.USER, "home_id": ids.USER},
        owner_column="id",
    ),
    "settings": Dump({"version": "bigint"}),
    "consents": Dump({"purpose": "text", "version": "bigint"}, without=("archived_at",)),
    "subscriptions": Dump({"plan": "text"}),
    "sessions": Dump(
        _BY_ID, ids={"id": ids.SESSION, "switched_from": ids.SESSION}, is_behind_wall=True
    ),
    "api_keys": Dump(_BY_ID, ids={"id": ids.API_KEY, "agent_id": ids.AGENT}, is_behind_wall=True),
    "agents": Dump(_BY_ID, ids={"id": ids.AGENT}),
    "invitations": Dump(
        _BY_ID, without=("token_hash",), ids={"id": ids.INVITATION}, is_behind_wall=True
    ),
    "memory_usage": Dump({"data_version": "bigint"}, without=("data_version",)),
    "usage_by_month": Dump({"month": "date"}),
    "ended_sessions": Dump({"session_id": "text"}),
    "transcripts": Dump({"session_id": "text"}, ids={"id": "trs"}),
    "attachments": Dump(
        _BY_ID,
        without=("upload_id",),
        ids={"id": ids.ATTACHMENT, "memory_id": ids.MEMORY},
    ),
    "embedding_models": Dump({"model": "text"}, without=("in_graph",)),
    "embeddings": Dump(
        {"model": "text", "memory_id": "uuid"},
        without=("in_graph", "content_hash"),
        ids={"memory_id": ids.MEMORY},
    ),
    "imports": Dump({"request_id": "text"}),
    "goals": Dump(_BY_ID, ids={"id": ids.GOAL}),
    "meditations": Dump(_BY_ID, ids={"id": ids.MEDITATION, "job_id": ids.JOB}),
    "meditation_users": Dump({"meditation_id": "uuid"}, ids={"meditation_id": ids.MEDITATION}),
    "user_schedules": Dump(_BY_ID, ids={"id": ids.SCHEDULE, "last_job_id": ids.JOB}),
    "jobs": Dump(
        _BY_ID,
        without=("lease_token", "lease_expires_at", "worker_id", "unique_key", "failed_leases"),
        ids={"id": ids.JOB},
    ),
    "exports": Dump(_BY_ID, without=("version_id",), ids={"id": ids.EXPORT, "job_id": ids.JOB}),
    "audit_events": Dump(_BY_ID, ids={"id": ids.AUDIT_EVENT}),
}
"""Tables whose rows are in an export as they are, under their names."""

ELSEWHERE: Final[Mapping[str, str]] = {
    "memories": "memories.jsonl, as the API shows them: with scores, and open",
    "memory_scores": "memories.jsonl, as their scores",
    "memory_versions": "memories.jsonl, each behind what became of it",
}
LEFT_OUT: Final[Mapping[str, str]] = {
    "accounts": "the hash of a password tells nobody anything, unless it is guessed",
    "api_key_secrets": "hashes of secrets, of which the keys are there",
    "mailed_tokens": "hashes of what was mailed, good for an hour",
    "mails": "that a mail is due, until it is sent: an email and its kind",
    "sign_ups": "who wants an account, until a mail confirms it: gone once there is one",
    "ended_grants": "which access tokens are refused until they expire",
    "user_keys": "a wrapped key, which opens nothing outside; what it sealed is there, open",
    "requests": "which requests are known again, for a week: hashes and ids",
    "doomed_objects": "what is about to be removed",
    "short_term_exits": "ids of memories that left the short term, which are there or deleted",
    "erasures": "who is erased has no export",
}


class Dumper:
    """Reads tables of one user at a time, a page a transaction."""

    def __init__(self, database: Database, system: SystemDatabase) -> None:
        self._database = database
        self._system = system

    async def lines(self, caller: Caller, table: str) -> AsyncIterator[bytes]:
        """Yield the rows of a table as JSON Lines, some hundred at a time.

        Raises:
            StoreUnavailable: PostgreSQL does not answer.
        """
        async for rows in self.rows(caller, table):
            yield b"".join(_line(row) for row in rows)

    async def rows(self, caller: Caller, table: str) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield the rows of a table, some hundred at a time, in order of their keys."""
        dump, after = DUMPS[table], list[str]()
        while True:
            opened = (
                self._system.transaction()
                if dump.is_behind_wall
                else self._database.transaction(caller)
            )
            async with opened as connection:
                page = await _page(connection, caller, table, dump, after)
            if page:
                yield [_shown(json.loads(row["row"]), dump) for row in page]
                after = list(page[-1]["key"])
            if len(page) < _PAGE:
                return


async def _page(
    connection: Connection, caller: Caller, table: str, dump: Dump, after: Sequence[str]
) -> list[Any]:
    columns = ", ".join(dump.key)
    beyond = ""
    if after:
        values = [f"${n}::text::{kind}" for n, kind in enumerate(dump.key.values(), start=4)]
        beyond = f"AND ({columns}) > ({', '.join(values)})"
    rows: list[Any] = await connection.fetch(
        f"""
        SELECT to_jsonb(row) - $3::text[] AS row,
               ARRAY[{", ".join(f"{column}::text" for column in dump.key)}] AS key
          FROM {table} AS row
         WHERE tenant_id = $1 AND {dump.owner_column} = $2 {beyond}
         ORDER BY {columns}
         LIMIT {_PAGE}
        """,  # noqa: S608 - put together from constants
        caller.tenant_id,
        caller.user_id,
        ["tenant_id", "user_id", "xid", *dump.without],
        *after,
    )
    return rows


def _shown(row: dict[str, Any], dump: Dump) -> dict[str, Any]:
    for column, prefix in (dump.ids or {}).items():
        if row[column] is not None:
            row[column] = ids.show(prefix, UUID(row[column]))
    return row


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
