"""Shards of a meditation: who may write about one, and from where."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from server.database import Connection
from server.errors import LeaseLost, NotFound

Cursor = tuple[UUID, UUID]
"""User and memory, in whose order a shard is scored."""

SHARD_JOB: Final = "meditation.shard"
"""Kind of the job that scores one shard."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of a run, opened by the worker whose lease token is its fence."""

    meditation_id: UUID
    number: int
    fence: int
    as_of: datetime
    shards: int
    tenant_id: UUID | None
    user_id: UUID | None
    """Both None: a run of all users."""
    full_run: bool
    """Every score is stored, not only those that moved."""
    dry_run: bool
    """Nothing is changed."""
    cursor: Cursor
    done: bool
    scored: int
    processed: int
    archived: int


_COLUMNS: Final = (
    *("fence", "as_of", "shards", "tenant_id", "user_id", "full_run", "dry_run"),
    *("done", "scored", "processed", "archived"),
)


async def claim(connection: Connection, meditation_id: UUID, number: int, fence: int) -> Shard:
    """Claim a shard for a lease: from now on nothing is stored under an earlier one.

    Raises:
        NotFound: There is no such shard.
        LeaseLost: A later lease has claimed it.
    """
    row = await connection.fetchrow(
        """
        UPDATE meditation_shards AS shard
           SET fence = greatest(fence, $3)
          FROM meditations AS run
         WHERE run.id = meditation_id AND meditation_id = $1 AND shard = $2
        RETURNING fence, as_of, shards, tenant_id, user_id, full_run, dry_run, cursor_user_id,
                  cursor_memory_id, done, scored, processed, archived
        """,
        meditation_id,
        number,
        fence,
    )
    if row is None:
        raise NotFound("shard")
    if row["fence"] != fence:
        raise LeaseLost
    cursor = row["cursor_user_id"], row["cursor_memory_id"]
    return Shard(meditation_id, number, cursor=cursor, **{name: row[name] for name in _COLUMNS})


async def hold(connection: Connection, shard: Shard) -> None:
    """Compare the fence with what it was, and keep it so until the commit.

    Raises:
        LeaseLost: A later lease has claimed the shard.
    """
    held = await connection.fetchval(
        """
        SELECT true
          FROM meditation_shards
         WHERE meditation_id = $1 AND shard = $2 AND fence = $3
           FOR UPDATE
        """,
        shard.meditation_id,
        shard.number,
        shard.fence,
    )
    if not held:
        raise LeaseLost


async def hold_at(connection: Connection, shard: Shard, cursor: Cursor) -> None:
    """Compare fence and cursor with what they were, and keep them so until the commit.

    Raises:
        LeaseLost: A later lease has claimed the shard, or the cursor has moved.
    """
    held = await connection.fetchval(
        """
        SELECT true
          FROM meditation_shards
         WHERE meditation_id = $1 AND shard = $2 AND fence = $3
           AND cursor_user_id = $4 AND cursor_memory_id = $5
           FOR UPDATE
        """,
        shard.meditation_id,
        shard.number,
        shard.fence,
        *cursor,
    )
    if not held:
        raise LeaseLost
