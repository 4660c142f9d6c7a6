"""Signing keys in Postgres."""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from server.auth.signing_keys import SigningKey
from server.database import Connection, SystemDatabase

_LOCK: Final = 0x6B696D64  # any number that nothing else locks


class KeyStore:
    """The keys that sign access tokens, those excepted that are withdrawn."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def list_keys(self) -> Sequence[SigningKey]:
        """Return all keys."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                SELECT kid, public_jwk, wrapped_private_key, published_at, signs_from
                  FROM signing_keys
                 WHERE withdrawn_at IS NULL
                """
            )
        return [
            SigningKey(
                kid=row["kid"],
                public_jwk=json.loads(row["public_jwk"]),
                wrapped_private_key=row["wrapped_private_key"],
                published_at=row["published_at"],
                signs_from=row["signs_from"],
            )
            for row in rows
        ]

    async def add_first(self, key: SigningKey) -> None:
        """Add a key unless there is one: of processes that start at once, one succeeds."""
        async with self._database.transaction() as connection:
            await _take_turns(connection)
            if not await connection.fetchval(
                "SELECT EXISTS (SELECT FROM signing_keys WHERE withdrawn_at IS NULL)"
            ):
                await _insert(connection, key)

    async def add_next(self, key: SigningKey) -> None:
        """Add a key unless one waits to sign: two rotations at once are one rotation."""
        async with self._database.transaction() as connection:
            await _take_turns(connection)
            if not await connection.fetchval(
                """
                SELECT EXISTS (
                    SELECT FROM signing_keys WHERE withdrawn_at IS NULL AND signs_from > $1)
                """,
                key.published_at,
            ):
                await _insert(connection, key)

    async def replace(self, kid: str, key: SigningKey) -> bool:
        """Withdraw a key at once; the other one takes its place unless a third one signs already.

        Returns:
            Whether there was such a key.
        """
        async with self._database.transaction() as connection:
            await _take_turns(connection)
            if not await _withdraw(connection, [kid], key.published_at):
                return False
            if not await connection.fetchval(
                """
                SELECT EXISTS (
                    SELECT FROM signing_keys WHERE withdrawn_at IS NULL AND signs_from <= $1)
                """,
                key.signs_from,
            ):
                await _insert(connection, key)
        return True

    async def withdraw(self, kids: Sequence[str], now: datetime) -> None:
        """Withdraw keys for good: their private halves are gone."""
        async with self._database.transaction() as connection:
            await _withdraw(connection, kids, now)


async def _withdraw(connection: Connection, kids: Sequence[str], now: datetime) -> bool:
    rows = await connection.fetch(
        """
        UPDATE signing_keys
           SET withdrawn_at = $2, wrapped_private_key = NULL
         WHERE kid = ANY ($1) AND withdrawn_at IS NULL
        RETURNING kid
        """,
        kids,
        now,
    )
    return bool(rows)


async def _take_turns(connection: Connection) -> None:
    await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)


async def _insert(connection: Connection, key: SigningKey) -> None:
    await connection.execute(
        """
        INSERT INTO signing_keys (kid, public_jwk, wrapped_private_key, published_at, signs_from)
        VALUES ($1, $2, $3, $4, $5)
        """,
        key.kid,
        json.dumps(dict(key.public_jwk)),
        key.wrapped_private_key,
        key.published_at,
        key.signs_from,
    )
