"""Exports in Postgres, each in its user's transactions."""

from datetime import timedelta
from typing import Final
from uuid import UUID

import asyncpg

from server import audit, ids, requests
from server.caller import Caller
from server.database import Connection, Database
from server.enqueue import enqueue
from server.errors import NotFound, RateLimited
from server.privacy.exports import Archive, Export, ExportState

EXPORT: Final = "user.export"
"""Kind of the job that writes an export."""
EXPIRE: Final = "exports.expire"
"""Kind of the job that removes one whose time is over."""

_MOST_A_DAY: Final = 5
_DAY: Final = timedelta(days=1)
_EXPIRE_ATTEMPTS: Final = 100
_SELECT: Final = """
    SELECT export.id, export.job_id, export.created_at, export.finished_at, export.expires_at,
           export.version_id, export.size_bytes, export.sha256,
           (SELECT state FROM jobs WHERE jobs.id = export.job_id) AS job_state
      FROM exports AS export
     WHERE export.tenant_id = $1 AND export.user_id = $2
"""


class ExportStore:
    """Asks for exports, shows them, and keeps that they are ready."""

    def __init__(self, database: Database, lifetime: timedelta) -> None:
        """Keep exports for `lifetime` once they are ready."""
        self._database = database
        self._lifetime = lifetime

    async def create(self, caller: Caller, request_id: str) -> Export:
        """Ask for an export, or return the one that is under way.

        Raises:
            RateLimited: There were five within a day.
            RequestIdReused: The request id stands for something else.
        """
        export_id = ids.new_id()
        async with self._database.transaction(caller) as connection:
            await _take_turns(connection, caller)
            if request_id:
                made = await requests.claim(
                    connection, caller, "CreateExport", request_id, b"", export_id
                )
                if made != export_id:
                    return await _get(connection, caller, made)
            pending = await _pending(connection, caller)
            if pending is None:
                await _refuse_many(connection, caller)
                return await _insert(connection, caller, export_id)
            if request_id:
                await requests.redirect(connection, caller, "CreateExport", request_id, pending.id)
            return pending

    async def get(self, caller: Caller, export_id: UUID) -> Export:
        """Return an export.

        Raises:
            NotFound: There is none, it has expired, or it is not the caller's.
        """
        async with self._database.transaction(caller) as connection:
            return await _get(connection, caller, export_id)

    async def note_download(self, caller: Caller, export_id: UUID) -> None:
        """Tell the audit log that the way to everything was shown."""
        async with self._database.transaction(caller) as connection:
            await audit.record(
                connection, caller, "export.download", ids.show(ids.EXPORT, export_id)
            )

    async def finish(self, caller: Caller, export_id: UUID, archive: Archive) -> None:
        """Keep that an export is ready; the first of two that were written stays.

        Raises:
            NotFound: It is gone: its user was erased meanwhile.
        """
        async with self._database.transaction(caller) as connection:
            row = await connection.fetchrow(
                """
                UPDATE exports
                   SET finished_at = now(), expires_at = now() + $3::interval, version_id = $4,
                       size_bytes = $5, sha256 = $6
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $7 AND finished_at IS NULL
                RETURNING expires_at
                """,
                caller.tenant_id,
                caller.user_id,
                self._lifetime,
                archive.version_id,
                archive.size_bytes,
                archive.sha256,
                export_id,
            )
            if row is None:
                await _get(connection, caller, export_id)
                return
            await audit.record(connection, caller, "export.finish", ids.show(ids.EXPORT, export_id))
            await enqueue(
                connection,
                kind=EXPIRE,
                payload=payload_of(caller, export_id),
                caller=caller,
                run_at=row["expires_at"],
                max_attempts=_EXPIRE_ATTEMPTS,
            )

    async def is_expired(self, caller: Caller, export_id: UUID) -> bool:
        """Tell whether an export is to be removed.

        Raises:
            NotFound: It is removed already.
        """
        async with self._database.transaction(caller) as connection:
            expired: bool | None = await connection.fetchval(
                """
                SELECT coalesce(expires_at <= now(), false)
                  FROM exports
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $3
                """,
                caller.tenant_id,
                caller.user_id,
                export_id,
            )
        if expired is None:
            raise NotFound("export")
        return expired

    async def remove(self, caller: Caller, export_id: UUID) -> None:
        """Forget an export whose archive is gone."""
        async with self._database.transaction(caller) as connection:
            await connection.execute(
                "DELETE FROM exports WHERE tenant_id = $1 AND user_id = $2 AND id = $3",
                caller.tenant_id,
                caller.user_id,
                export_id,
            )
            await audit.record_all(
                connection,
                caller,
                "export.expire",
                [ids.show(ids.EXPORT, export_id)],
                actor=audit.SYSTEM,
            )


async def ask_for_export(connection: Connection, caller: Caller) -> UUID:
    """Ask for an export in the caller's transaction and return the id of its job.

    That is the one that is under way, if there is one.

    Raises:
        RateLimited: There were five within a day.
    """
    await _take_turns(connection, caller)
    export = await _pending(connection, caller)
    if export is None:
        await _refuse_many(connection, caller)
        export = await _insert(connection, caller, ids.new_id())
    return export.job_id


async def _take_turns(connection: Connection, caller: Caller) -> None:
    await connection.execute(
        "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"exports/{caller.user_id}"
    )


def payload_of(caller: Caller, export_id: UUID) -> dict[str, str]:
    """Return what the jobs of an export are told."""
    return {
        "tenant_id": ids.show(ids.TENANT, caller.tenant_id),
        "user_id": ids.show(ids.USER, caller.user_id),
        "export_id": ids.show(ids.EXPORT, export_id),
    }


async def _pending(connection: Connection, caller: Caller) -> Export | None:
    """Return the caller's export that is under way."""
    row = await connection.fetchrow(
        f"""
        {_SELECT} AND finished_at IS NULL
           AND EXISTS (SELECT FROM jobs
                        WHERE jobs.id = export.job_id AND state IN ('waiting', 'running'))
         ORDER BY export.id DESC
         LIMIT 1
        """,
        caller.tenant_id,
        caller.user_id,
    )
    return _export(row) if row else None


async def _refuse_many(connection: Connection, caller: Caller) -> None:
    count = await connection.fetchval(
        """
        SELECT count(*)
          FROM exports
         WHERE tenant_id = $1 AND user_id = $2 AND created_at > now() - $3::interval
        """,
        caller.tenant_id,
        caller.user_id,
        _DAY,
    )
    if count >= _MOST_A_DAY:
        raise RateLimited("exports", _DAY)


async def _insert(connection: Connection, caller: Caller, export_id: UUID) -> Export:
    shown = ids.show(ids.EXPORT, export_id)
    job_id = await enqueue(
        connection,
        kind=EXPORT,
        payload=payload_of(caller, export_id),
        caller=caller,
        unique_key=f"{EXPORT}/{shown}",
    )
    await connection.execute(
        "INSERT INTO exports (tenant_id, user_id, id, job_id) VALUES ($1, $2, $3, $4)",
        caller.tenant_id,
        caller.user_id,
        export_id,
        job_id,
    )
    await audit.record(connection, caller, "export.create", shown)
    return await _get(connection, caller, export_id)


async def _get(connection: Connection, caller: Caller, export_id: UUID) -> Export:
    row = await connection.fetchrow(
        f"{_SELECT} AND export.id = $3 AND (expires_at > now()) IS NOT FALSE",
        caller.tenant_id,
        caller.user_id,
        export_id,
    )
    if row is None:
        raise NotFound("export")
    return _export(row)


def _export(row: asyncpg.Record) -> Export:
    archive = None
    # A job that is over, or forgotten, and wrote nothing will not write it any more.
    is_pending = row["job_state"] in ("waiting", "running")
    state = ExportState.PENDING if is_pending else ExportState.FAILED
    if row["finished_at"]:
        state = ExportState.READY
        archive = Archive(row["version_id"], row["size_bytes"], row["sha256"])
    return Export(
        id=row["id"],
        job_id=row["job_id"],
        state=state,
        created_at=row["created_at"],
        finished_at=row["finished_at"],
        expires_at=row["expires_at"],
        archive=archive,
    )
