"""Keys and whereabouts of the audit log's checkpoints in Postgres, as the system role."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from server.database import Connection, SystemDatabase
from server.users.chain import Head
from server.users.checkpoints import Checkpoint

_LOCK: Final = 0x6B696D6B  # any number that nothing else locks
_BEFORE_ALL: Final = UUID(int=0)


@dataclass(frozen=True, slots=True)
class AuditKey:
    """A key pair that signs checkpoints; both halves are in what is wrapped."""

    key_id: str
    wrapped_private_key: bytes
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Moved:
    """A chain that grew since its newest checkpoint."""

    tenant_id: UUID
    head: Head
    recorded: int | None
    """Place of the newest checkpoint that is known to be in S3."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """The newest checkpoint of a tenant that is known to be in S3."""

    position: int
    key_id: str
    signed_at: datetime


class CheckpointStore:
    """What the database knows of checkpoints. What they say is in S3 alone."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def list_keys(self) -> Sequence[AuditKey]:
        """Return all keys there ever were, the oldest first."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                SELECT key_id, wrapped_private_key, created_at
                  FROM audit_keys
                 ORDER BY created_at, key_id
                """
            )
        return [AuditKey(**row) for row in rows]

    async def add_first_key(self, key: AuditKey) -> None:
        """Add a key unless there is one: of processes that start at once, one succeeds."""
        async with self._database.transaction() as connection:
            await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
            if not await connection.fetchval("SELECT EXISTS (SELECT FROM audit_keys)"):
                await _insert_key(connection, key)

    async def add_key(self, key: AuditKey) -> None:
        """Add a key, which signs from now on."""
        async with self._database.transaction() as connection:
            await _insert_key(connection, key)

    async def rewrap_key(self, key: AuditKey, wrapped: bytes) -> None:
        """Replace what is wrapped, unless somebody else did meanwhile."""
        async with self._database.transaction() as connection:
            await connection.execute(
                """
                UPDATE audit_keys
                   SET wrapped_private_key = $3
                 WHERE key_id = $1 AND wrapped_private_key = $2
                """,
                key.key_id,
                key.wrapped_private_key,
                wrapped,
            )

    async def moved(self, *, after: UUID | None, limit: int) -> Sequence[Moved]:
        """Return chains that grew since their newest checkpoint, in order of their tenants."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                SELECT head.tenant_id, head.position, head.hash, checkpoint.position AS recorded
                  FROM audit_heads AS head
                  LEFT JOIN audit_checkpoints AS checkpoint USING (tenant_id)
                 WHERE head.tenant_id > $1
                   AND head.position > coalesce(checkpoint.position, 0)
                 ORDER BY head.tenant_id
                 LIMIT $2
                """,
                after or _BEFORE_ALL,
                limit,
            )
        return [
            Moved(row["tenant_id"], Head(row["position"], row["hash"]), row["recorded"])
            for row in rows
        ]

    async def recorded(self, tenant_id: UUID) -> Recorded | None:
        """Return the newest checkpoint of a tenant that is known to be in S3."""
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                "SELECT position, key_id, signed_at FROM audit_checkpoints WHERE tenant_id = $1",
                tenant_id,
            )
        return Recorded(**row) if row else None

    async def record(self, checkpoint: Checkpoint) -> None:
        """Note that S3 has a checkpoint, unless a newer one is noted."""
        async with self._database.transaction() as connection:
            await connection.execute(
                """
                INSERT INTO audit_checkpoints AS known (tenant_id, position, key_id, signed_at)
                VALUES ($1, $2, $3, $4)
                    ON CONFLICT (tenant_id)
                    DO UPDATE SET position = excluded.position, key_id = excluded.key_id,
                                  signed_at = excluded.signed_at
                        WHERE known.position < excluded.position
                """,
                checkpoint.tenant_id,
                checkpoint.position,
                checkpoint.key_id,
                checkpoint.signed_at,
            )

    async def hashes(self, tenant_id: UUID, positions: Collection[int]) -> Mapping[int, bytes]:
        """Return the hashes that a chain has at some places, as far as it reaches."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                SELECT position, hash
                  FROM audit_links
                 WHERE tenant_id = $1 AND position = ANY ($2)
                """,
                tenant_id,
                list(positions),
            )
        return {row["position"]: row["hash"] for row in rows}


async def _insert_key(connection: Connection, key: AuditKey) -> None:
    await connection.execute(
        "INSERT INTO audit_keys (key_id, wrapped_private_key, created_at) VALUES ($1, $2, $3)",
        key.key_id,
        key.wrapped_private_key,
        key.created_at,
    )
