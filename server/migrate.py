"""Numbered SQL files, each applied once, in order, in a transaction of its own."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import structlog

log = structlog.get_logger()

DIRECTORY = Path(__file__).parent / "migrations"
_NAME = re.compile(r"(\d{4})_[a-z_]+\.sql\Z")
_LOCK = 0x6B696D62  # any number that nothing else locks


class MigrationChanged(Exception):
    """A file that was applied has changed since: write a new one instead."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file of SQL."""

    number: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the SQL, in hexadecimal."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


def read_migrations(directory: Path = DIRECTORY) -> list[Migration]:
    """Return the migrations in order of their numbers."""
    found = [
        Migration(int(match.group(1)), path.name, path.read_text())
        for path in sorted(directory.glob("*.sql"))
        if (match := _NAME.match(path.name))
    ]
    if [migration.number for migration in found] != list(range(1, len(found) + 1)):
        raise ValueError(f"migrations in {directory} are not numbered 1, 2, 3, …")
    return found


async def migrate(connection: asyncpg.Connection, migrations: list[Migration]) -> int:
    """Apply what is not yet applied and return how many that were.

    Two processes that migrate at once wait for each other. A process that dies half-way
    leaves the last whole migration.

    Raises:
        MigrationChanged: A file differs from what was applied under its number.
    """
    await connection.execute("SELECT pg_advisory_lock($1)", _LOCK)
    try:
        applied = await _applied(connection)
        for migration in migrations:
            if applied.get(migration.number, migration.checksum) != migration.checksum:
                raise MigrationChanged(f"{migration.name} changed after it was applied")
        waiting = [migration for migration in migrations if migration.number not in applied]
        for migration in waiting:
            await _apply(connection, migration)
        return len(waiting)
    finally:
        await connection.execute("SELECT pg_advisory_unlock($1)", _LOCK)


async def _applied(connection: asyncpg.Connection) -> dict[int, str]:
    await connection.execute(
        """
        CREATE TABLE IF NOT EXISTS migrations (
            number     integer     PRIMARY KEY,
            name       text        NOT NULL,
            checksum   text        NOT NULL,
            applied_at timestamptz NOT NULL DEFAULT now()
        )
        """
    )
    rows = await connection.fetch("SELECT number, checksum FROM migrations")
    return {row["number"]: row["checksum"] for row in rows}


async def _apply(connection: asyncpg.Connection, migration: Migration) -> None:
    async with connection.transaction():
        await connection.execute(migration.sql)
        await connection.execute(
            "INSERT INTO migrations (number, name, checksum) VALUES ($1, $2, $3)",
            migration.number,
            migration.name,
            migration.checksum,
        )
    log.info("migration applied", name=migration.name)
