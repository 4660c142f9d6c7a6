"""API keys in Postgres, as the system role: a key is shown before anybody is known."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

import asyncpg

from server import audit, ids
from server.auth.api_keys import MOST_KEYS, ApiKey, Opened, Secret
from server.auth.refresh_tokens import hash_of
from server.caller import Caller
from server.database import Connection, SystemDatabase
from server.errors import NotFound, QuotaExceeded
from server.grants import end_grants

_KEPT: Final = timedelta(days=30)
_USE_NOTED_EVERY: Final = timedelta(minutes=1)
_KEY: Final = """
    key.id, key.tenant_id, key.user_id, key.name, key.prefix, key.scopes, key.created_at,
    key.expires_at, key.last_used_at
"""


class ApiKeyStore:
    """What users gave to scripts and agents."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def create(self, key: ApiKey, secret: Secret) -> None:
        """Store a key with its first secret.

        Raises:
            QuotaExceeded: The user has as many keys as one may have.
        """
        async with self._database.transaction() as connection:
            await _take_turns(connection, key.caller)
            await _check_room(connection, key.caller, key.created_at)
            await connection.execute(
                """
                INSERT INTO api_keys (tenant_id, user_id, id, name, prefix, scopes, created_at,
                                      expires_at)
                VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
                """,
                key.caller.tenant_id,
                key.caller.user_id,
                key.id,
                key.name,
                key.prefix,
                list(key.scopes),
                key.created_at,
                key.expires_at,
            )
            await _insert_secret(connection, key, secret)
            await _record(connection, key, "api_key.create")

    async def list_keys(self, caller: Caller) -> Sequence[ApiKey]:
        """Return the keys of a user that are not revoked, the newest first."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                f"""
                SELECT {_KEY}
                  FROM api_keys AS key
                 WHERE key.tenant_id = $1 AND key.user_id = $2 AND key.revoked_at IS NULL
                 ORDER BY key.id DESC
                """,  # noqa: S608 - a constant of ours
                caller.tenant_id,
                caller.user_id,
            )
        return [_key(row) for row in rows]

    async def rotate(
        self, caller: Caller, key_id: UUID, secret: Secret, overlap: timedelta, now: datetime
    ) -> ApiKey:
        """Give a key another secret. The old ones stay good for a while, or end at once.

        Raises:
            NotFound: The user has no such key that goes on.
        """
        async with self._database.transaction() as connection:
            key = await _lock(connection, caller, key_id, now)
            if overlap:
                await _let_expire(connection, key, now + overlap)
            else:
                await _end_secrets(connection, key)
            await _insert_secret(connection, key, secret)
            row = await connection.fetchrow(
                f"""
                UPDATE api_keys AS key
                   SET prefix = $4
                 WHERE key.tenant_id = $1 AND key.user_id = $2 AND key.id = $3
                RETURNING {_KEY}
                """,  # noqa: S608 - a constant of ours
                caller.tenant_id,
                caller.user_id,
                key_id,
                secret.prefix,
            )
            await _record(connection, key, "api_key.rotate")
        return _key(row)

    async def revoke(self, caller: Caller, key_id: UUID, now: datetime) -> None:
        """End a key and everything that was made with it.

        Raises:
            NotFound: The user has no such key that is not revoked.
        """
        async with self._database.transaction() as connection:
            key = await _lock(connection, caller, key_id)
            await _end_secrets(connection, key)
            await connection.execute(
                """
                UPDATE api_keys
                   SET revoked_at = $4
                 WHERE tenant_id = $1 AND user_id = $2 AND id = $3
                """,
                caller.tenant_id,
                caller.user_id,
                key_id,
                now,
            )
            await _record(connection, key, "api_key.revoke")

    async def open(self, secret: str, now: datetime) -> Opened | None:
        """Return the key that a secret opens, if any, and note that it was used."""
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                f"""
                SELECT {_KEY}, secret.grant_id, least(key.expires_at, secret.expires_at) AS until,
                       users.role
                  FROM api_key_secrets AS secret
                  JOIN api_keys AS key ON key.id = secret.key_id
                  JOIN users ON users.id = key.user_id AND users.disabled_at IS NULL
                 WHERE secret.hash = $1 AND secret.expires_at > $2 AND key.expires_at > $2
                   AND key.revoked_at IS NULL
                """,  # noqa: S608 - a constant of ours
                hash_of(secret),
                now,
            )
            if row is None:
                return None
            key = _key(row)
            await _note_use(connection, key, now)
            await _record(connection, key, "api_key.exchange")
        return Opened(key, row["grant_id"], row["until"], row["role"])

    async def forget(self, now: datetime) -> None:
        """Delete secrets that have expired, and keys that ended a while ago."""
        async with self._database.transaction() as connection:
            await connection.execute("DELETE FROM api_key_secrets WHERE expires_at <= $1", now)
            await connection.execute(
                "DELETE FROM api_keys WHERE revoked_at <= $1 OR expires_at <= $1", now - _KEPT
            )


def _key(row: asyncpg.Record) -> ApiKey:
    return ApiKey(
        id=row["id"],
        caller=Caller(row["tenant_id"], row["user_id"]),
        name=row["name"],
        prefix=row["prefix"],
        scopes=row["scopes"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        last_used_at=row["last_used_at"],
    )


async def _take_turns(connection: Connection, caller: Caller) -> None:
    """Let keys of one user be made one after the other: they are counted first."""
    await connection.execute(
        "SELECT FROM users WHERE tenant_id = $1 AND id = $2 FOR NO KEY UPDATE",
        caller.tenant_id,
        caller.user_id,
    )


async def _check_room(connection: Connection, caller: Caller, now: datetime) -> None:
    used = await connection.fetchval(
        """
        SELECT count(*)
          FROM api_keys
         WHERE tenant_id = $1 AND user_id = $2 AND revoked_at IS NULL AND expires_at > $3
        """,
        caller.tenant_id,
        caller.user_id,
        now,
    )
    if used >= MOST_KEYS:
        raise QuotaExceeded("API keys", used, MOST_KEYS, "revoke one of them", "keys")


async def _lock(
    connection: Connection, caller: Caller, key_id: UUID, living_at: datetime | None = None
) -> ApiKey:
    row = await connection.fetchrow(
        f"""
        SELECT {_KEY}
          FROM api_keys AS key
         WHERE key.tenant_id = $1 AND key.user_id = $2 AND key.id = $3 AND key.revoked_at IS NULL
           AND key.expires_at > coalesce($4::timestamptz, '-infinity')
           FOR UPDATE
        """,  # noqa: S608 - a constant of ours
        caller.tenant_id,
        caller.user_id,
        key_id,
        living_at,
    )
    if row is None:
        raise NotFound("API key")
    return _key(row)


async def _insert_secret(connection: Connection, key: ApiKey, secret: Secret) -> None:
    await connection.execute(
        """
        INSERT INTO api_key_secrets (tenant_id, user_id, hash, key_id, grant_id, expires_at)
        VALUES ($1, $2, $3, $4, $5, $6)
        """,
        key.caller.tenant_id,
        key.caller.user_id,
        secret.hash,
        key.id,
        secret.grant_id,
        key.expires_at,
    )


async def _let_expire(connection: Connection, key: ApiKey, then: datetime) -> None:
    await connection.execute(
        """
        UPDATE api_key_secrets
           SET expires_at = least(expires_at, $4)
         WHERE tenant_id = $1 AND user_id = $2 AND key_id = $3
        """,
        key.caller.tenant_id,
        key.caller.user_id,
        key.id,
        then,
    )


async def _end_secrets(connection: Connection, key: ApiKey) -> None:
    rows = await connection.fetch(
        """
        DELETE FROM api_key_secrets
         WHERE tenant_id = $1 AND user_id = $2 AND key_id = $3
        RETURNING grant_id
        """,
        key.caller.tenant_id,
        key.caller.user_id,
        key.id,
    )
    await end_grants(connection, key.caller, [row["grant_id"] for row in rows])


async def _note_use(connection: Connection, key: ApiKey, now: datetime) -> None:
    await connection.execute(
        """
        UPDATE api_keys
           SET last_used_at = $4
         WHERE tenant_id = $1 AND user_id = $2 AND id = $3
           AND (last_used_at IS NULL OR last_used_at <= $5)
        """,
        key.caller.tenant_id,
        key.caller.user_id,
        key.id,
        now,
        now - _USE_NOTED_EVERY,
    )


async def _record(connection: Connection, key: ApiKey, action: str) -> None:
    await audit.record(connection, key.caller, action, ids.show(ids.API_KEY, key.id))
