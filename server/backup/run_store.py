"""What became of backups in Postgres, as the system role."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal
from uuid import UUID

from server import ids
from server.database import SystemDatabase

Kind = Literal["create", "verify"]
Outcome = Literal["succeeded", "failed"]

GAUGES: Final[Mapping[str, str]] = {
    "backup_last_success_timestamp_seconds": "When the newest backup was made: its mark.",
    "backup_last_bytes": "How much the newest backup has added to its bucket.",
    "backup_verify_last_success_timestamp_seconds": "When a backup was last proved to be whole.",
    "backup_verify_ok": "0: the last verification found something wrong. 1: it did not.",
}
"""Names and meanings of what `RunStore.gauges` returns."""


@dataclass(frozen=True, slots=True)
class Finished:
    """How a run ended."""

    outcome: Outcome
    report: Mapping[str, Any]
    size_bytes: int | None = None
    digest: bytes | None = None


class RunStore:
    """Keeps what was run. One method, one statement."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def begin(self, kind: Kind) -> UUID:
        """Note that a run begins, and return its id.

        Only one of a kind runs at a time: one that is noted as running has died.
        """
        run_id = ids.new_id()
        await self._database.fetch_alone(
            """
            WITH lost AS (
                UPDATE backup_runs SET finished_at = now(), outcome = 'lost'
                 WHERE kind = $2 AND finished_at IS NULL
            )
            INSERT INTO backup_runs (id, kind) VALUES ($1, $2)
            """,
            run_id,
            kind,
        )
        return run_id

    async def name(self, run_id: UUID, backup: str) -> None:
        """Note of which backup a run is."""
        await self._database.fetch_alone(
            "UPDATE backup_runs SET backup = $2 WHERE id = $1", run_id, backup
        )

    async def finish(self, run_id: UUID, finished: Finished) -> None:
        """Note how a run ended."""
        await self._database.fetch_alone(
            """
            UPDATE backup_runs
               SET finished_at = now(), outcome = $2, bytes = $3, digest = $4, report = $5
             WHERE id = $1
            """,
            run_id,
            finished.outcome,
            finished.size_bytes,
            finished.digest,
            json.dumps(finished.report),
        )

    async def is_restoring(self, backup: str) -> bool:
        """Tell whether the database is a copy of which something is still to be restored.

        A backup holds the run that made it as one that runs. Nowhere else does it run for ever.
        """
        rows = await self._database.fetch_alone(
            """
            SELECT FROM backup_runs
             WHERE kind = 'create' AND backup = $1 AND finished_at IS NULL
            """,
            backup,
        )
        return bool(rows)

    async def finish_restore(self, backup: str, finished: Finished) -> None:
        """Note of the run that made a backup how it ended: nothing is left to be restored."""
        await self._database.fetch_alone(
            """
            UPDATE backup_runs
               SET finished_at = now(), outcome = $2, bytes = $3, digest = $4, report = $5
             WHERE kind = 'create' AND backup = $1 AND finished_at IS NULL
            """,
            backup,
            finished.outcome,
            finished.size_bytes,
            finished.digest,
            json.dumps(finished.report),
        )

    async def gauges(self) -> Mapping[str, float]:
        """Return what is to be watched, by the names of GAUGES; what never was is left out."""
        (row,) = await self._database.fetch_alone(
            """
            SELECT extract(epoch FROM made.marked_at)::float8
                       AS backup_last_success_timestamp_seconds,
                   made.bytes::float8 AS backup_last_bytes,
                   extract(epoch FROM proved.finished_at)::float8
                       AS backup_verify_last_success_timestamp_seconds,
                   (verified.outcome = 'succeeded')::integer::float8 AS backup_verify_ok
              FROM (VALUES (true)) AS always
              LEFT JOIN LATERAL (
                   SELECT (report ->> 'mark')::timestamptz AS marked_at, bytes
                     FROM backup_runs
                    WHERE kind = 'create' AND outcome = 'succeeded'
                    ORDER BY id DESC LIMIT 1) AS made ON true
              LEFT JOIN LATERAL (
                   SELECT finished_at
                     FROM backup_runs
                    WHERE kind = 'verify' AND outcome = 'succeeded'
                    ORDER BY id DESC LIMIT 1) AS proved ON true
              LEFT JOIN LATERAL (
                   SELECT outcome
                     FROM backup_runs
                    WHERE kind = 'verify' AND outcome IS NOT NULL
                    ORDER BY id DESC LIMIT 1) AS verified ON true
            """
        )
        return {name: value for name, value in row.items() if value is not None}
