"""Failed log-ins in Postgres."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime

import asyncpg

from server.auth.throttling import FORGOTTEN_AFTER, Record, Standing, subject_of
from server.database import Connection, SystemDatabase


class AttemptStore:
    """Counts attempts to log in. Of an unknown email as of a known one, in the same statements."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def begin(self, email: str, place: str, now: datetime) -> bool:
        """Count an attempt as failed, and tell whether its password is to be looked at."""
        async with self._turn(email) as connection:
            standing = await _read(connection, email, place, now)
            await _write(connection, email, place, standing.begun(now))
        return standing.is_allowed(now)

    async def succeed(self, email: str, place: str, now: datetime) -> None:
        """Strike an attempt off the count: it was the user."""
        async with self._turn(email) as connection:
            standing = await _read(connection, email, place, now)
            await _write(connection, email, place, standing.succeeded(now))

    async def forget(self, now: datetime) -> None:
        """Delete counts that would begin anew, and places that are no longer known."""
        async with self._database.transaction() as connection:
            await connection.execute(
                "DELETE FROM log_in_attempts WHERE tried_at < $1 AND known_until < $2",
                now - FORGOTTEN_AFTER,
                now,
            )

    @asynccontextmanager
    async def _turn(self, email: str) -> AsyncIterator[Connection]:
        """Open a transaction after those that are about the same email: what is read is current."""
        async with self._database.transaction() as connection:
            lock = int.from_bytes(subject_of(email)[:8], signed=True)
            await connection.execute("SELECT pg_advisory_xact_lock($1)", lock)
            yield connection


async def _read(connection: Connection, email: str, place: str, now: datetime) -> Standing:
    subjects = [subject_of(email, place), subject_of(email)]
    rows = await connection.fetch(
        """
        SELECT subject, failures, tried_at, blocked_until, known_until
          FROM log_in_attempts
         WHERE subject = ANY ($1)
        """,
        subjects,
    )
    found = {bytes(row["subject"]): _record(row) for row in rows}
    here, everywhere = (found.get(subject, Record.blank(now)) for subject in subjects)
    return Standing(here, everywhere)


def _record(row: asyncpg.Record) -> Record:
    return Record(row["failures"], row["tried_at"], row["blocked_until"], row["known_until"])


async def _write(connection: Connection, email: str, place: str, standing: Standing) -> None:
    records = [standing.here, standing.everywhere]
    await connection.execute(
        """
        INSERT INTO log_in_attempts (subject, failures, tried_at, blocked_until, known_until)
        SELECT *
          FROM unnest($1::bytea[], $2::int[], $3::timestamptz[], $4::timestamptz[],
                      $5::timestamptz[])
            ON CONFLICT (subject) DO UPDATE
           SET failures = excluded.failures, tried_at = excluded.tried_at,
               blocked_until = excluded.blocked_until, known_until = excluded.known_until
        """,
        [subject_of(email, place), subject_of(email)],
        [record.failures for record in records],
        [record.tried_at for record in records],
        [record.blocked_until for record in records],
        [record.known_until for record in records],
    )
