"""Rotation: users' data keys, wrapped anew after the master key has changed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import asyncpg
import structlog

from server.caller import Caller
from server.data_keys import context_of
from server.database import SystemDatabase
from server.kms import Kms, UnwrapFailed

log = structlog.get_logger()

_PATIENCE_SECONDS: Final = 3.0


@dataclass(frozen=True, slots=True)
class Page:
    """What became of some data keys."""

    rewrapped: int
    unreadable: int
    last: UUID | None
    """Where the next page starts after; None: there is none."""


class KeyRotation:
    """Wraps data keys by the newest master key. The keys, and what they sealed, stay the same."""

    def __init__(self, database: SystemDatabase, kms: Kms) -> None:
        self._database = database
        self._kms = kms

    async def rewrap(self, after: UUID | None, limit: int) -> Page:
        """Wrap the next keys anew that an older master key wraps.

        A page ends early when the key manager is slow. Repeating one does no harm: keys that are
        done are left out.

        Raises:
            StoreUnavailable: The key manager does not answer; the page is to be repeated.
        """
        keys = await self._outdated(after, limit)
        fresh: dict[UUID, bytes] = {}
        done, started = 0, time.monotonic()
        # No transaction is open here: the key manager may take its time.
        for key in keys:
            if done and time.monotonic() - started > _PATIENCE_SECONDS:
                break
            wrapped = await self._rewrapped(key)
            if wrapped is not None:
                fresh[key["id"]] = wrapped
            done += 1
        stored = await self._store(keys[:done], fresh)
        more = done < len(keys) or len(keys) == limit
        return Page(stored, done - len(fresh), keys[done - 1]["id"] if more else None)

    async def _outdated(self, after: UUID | None, limit: int) -> Sequence[asyncpg.Record]:
        newest = await self._kms.newest_version()
        async with self._database.transaction() as connection:
            keys: Sequence[asyncpg.Record] = await connection.fetch(
                """
                SELECT id, tenant_id, user_id, wrapped
                  FROM user_keys
                 WHERE kms_version <> $1
                   AND id > coalesce($2, '00000000-0000-0000-0000-000000000000'::uuid)
                 ORDER BY id
                 LIMIT $3
                """,
                newest,
                after,
                limit,
            )
        return keys

    async def _rewrapped(self, key: asyncpg.Record) -> bytes | None:
        caller = Caller(tenant_id=key["tenant_id"], user_id=key["user_id"])
        try:
            return await self._kms.rewrap(key["wrapped"], context=context_of(caller))
        except UnwrapFailed:
            log.exception("data key not unwrapped", key=str(key["id"]))
            return None

    async def _store(self, keys: Sequence[asyncpg.Record], fresh: dict[UUID, bytes]) -> int:
        """Store what is still as it was read, and return how many keys that were.

        A key that was shredded meanwhile stays so.
        """
        old = {key["id"]: key["wrapped"] for key in keys if key["id"] in fresh}
        async with self._database.transaction() as connection:
            stored = await connection.fetch(
                """
                UPDATE user_keys AS key
                   SET wrapped = fresh.wrapped, kms_version = fresh.kms_version
                  FROM unnest($1::uuid[], $2::bytea[], $3::bytea[], $4::text[])
                       AS fresh (id, old, wrapped, kms_version)
                 WHERE key.id = fresh.id AND key.wrapped = fresh.old
                RETURNING key.id
                """,
                list(fresh),
                list(old.values()),
                list(fresh.values()),
                [self._kms.version_of(wrapped) for wrapped in fresh.values()],
            )
        return len(stored)
