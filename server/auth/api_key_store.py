"""API keys in Postgres, as the system role: a key is shown before anybody is known."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

import asyncpg

from server import audit, ids, requests
from server.auth.api_keys import MOST_KEYS, ApiKey, Opened, Secret
from server.auth.refresh_tokens import hash_of
from server.caller import ActingAgent, Caller
from server.consent import MEMORY_AGENT_ACCESS
from server.database import Connection, SystemDatabase
from server.errors import ConsentMissing, NotFound, QuotaExceeded
from server.grants import check_living, end_grants

_KEPT: Final = timedelta(days=30)
_USE_NOTED_EVERY: Final = timedelta(minutes=1)
_KEY: Final = """
    key.id, key.tenant_id, key.user_id, key.name, key.prefix, key.scopes, key.created_at,
    key.expires_at, key.last_used_at, key.agent_id
"""


class ApiKeyStore:
    """What users gave to scripts and agents."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def create(
        self, key: ApiKey, secret: Secret, request_id: str, contents: bytes, grant_id: UUID
    ) -> tuple[ApiKey, bool]:
        """Store a key with its first secret.

        Args:
            key: The key.
            secret: What opens it.
            request_id: Chosen by the client; empty for none.
            contents: The request, to recognise a retry by.
            grant_id: What the call was made with.

        Returns:
            The key, or the one that an earlier request of the same id made; and whether it is new.

        Raises:
            Unauthenticated: The grant has ended.
            NotFound: What an earlier request made is revoked.
            QuotaExceeded: The user has as many keys as one may have.
            RequestIdReused: The request id stands for other contents.
        """
        async with self._database.transaction() as connection:
            if request_id:
                first_id = await requests.claim(
                    connection, key.caller, "CreateApiKey", request_id, contents, key.id
                )
                if first_id != key.id:
                    return await _lock(connection, key.caller, first_id), False
            await hold_grant(connection, key.caller, grant_id)
            await _check_room(connection, key.caller, key.created_at)
            await insert_key(connection, key)
            await insert_secret(connection, key, secret)
            await _record(connection, key, "api_key.create")
        return key, True

    async def list_keys(self, caller: Caller) -> Sequence[ApiKey]:
        """Return the keys of a user's scripts that are not revoked, the newest first."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                f"""
                SELECT {_KEY}
                  FROM api_keys AS key
                 WHERE key.tenant_id = $1 AND key.user_id = $2 AND key.revoked_at IS NULL
                   AND key.agent_id IS NULL
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
            await retire_secrets(connection, key, now, overlap)
            await insert_secret(connection, key, secret)
            await _record(connection, key, "api_key.rotate")
            return await renew(connection, key, secret.prefix, key.expires_at)

    async def revoke(self, caller: Caller, key_id: UUID, now: datetime) -> None:
        """End a key and everything that was made with it.

        Raises:
            NotFound: The user has no such key that is not revoked.
        """
        async with self._database.transaction() as connection:
            key = await _lock(connection, caller, key_id)
            await end_key(connection, key, now)
            await _record(connection, key, "api_key.revoke")

    async def open(self, secret: str, now: datetime) -> Opened | None:
        """Return the key that a secret opens, if any, and note that it was used.

        Raises:
            ConsentMissing: It is an agent's, whom the user does not let act.
        """
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                f"""
                SELECT {_KEY}, secret.grant_id, least(key.expires_at, secret.expires_at) AS until,
                       users.role, agent.id IS NULL OR coalesce((
                           SELECT granted
                             FROM consents
                            WHERE consents.tenant_id = key.tenant_id
                              AND consents.user_id = key.user_id AND purpose = $3
                            ORDER BY version DESC
                            LIMIT 1), false) AS may_act
                  FROM api_key_secrets AS secret
                  JOIN api_keys AS key ON key.id = secret.key_id
                  JOIN users ON users.id = key.user_id AND users.disabled_at IS NULL
                  LEFT JOIN users AS home ON home.id = users.home_id
                  LEFT JOIN agents AS agent ON agent.id = key.agent_id
                 WHERE secret.hash = $1 AND secret.expires_at > $2 AND key.expires_at > $2
                   AND key.revoked_at IS NULL AND agent.disabled_at IS NULL
                   AND home.disabled_at IS NULL
                """,  # noqa: S608 - a constant of ours
                hash_of(secret),
                now,
                MEMORY_AGENT_ACCESS,
            )
            if row is None:
                return None
            if not row["may_act"]:
                raise ConsentMissing(MEMORY_AGENT_ACCESS)
            key = _key(row)
            await _note_use(connection, key, now)
            await _record(connection, key, "api_key.exchange")
        return Opened(key, row["grant_id"], row["until"], row["role"])

    async def forget(self, now: datetime) -> None:
        """Delete secrets that have expired, and keys that ended a while ago.

        The key of an agent may be renewed as long as the agent is not deleted.
        """
        async with self._database.transaction() as connection:
            await connection.execute("DELETE FROM api_key_secrets WHERE expires_at <= $1", now)
            await connection.execute(
                """
                DELETE FROM api_keys
                 WHERE revoked_at <= $1 OR (expires_at <= $1 AND agent_id IS NULL)
                """,
                now - _KEPT,
            )


async def hold_grant(connection: Connection, caller: Caller, grant_id: UUID) -> None:
    """Make sure that what a call was made with has not ended, nor does it with all keys meanwhile.

    A log-in that has just ended, and every key with it, must not leave a new one behind: processes
    learn of the end seconds later.

    Raises:
        Unauthenticated: It has ended.
    """
    await _take_turns(connection, caller)
    await check_living(connection, caller, grant_id)


async def insert_key(connection: Connection, key: ApiKey) -> None:
    """Store a key, which nothing opens yet. It is the agent's if one acts for the user."""
    await connection.execute(
        """
        INSERT INTO api_keys (tenant_id, user_id, id, name, prefix, scopes, created_at,
                              expires_at, agent_id)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
        """,
        key.caller.tenant_id,
        key.caller.user_id,
        key.id,
        key.name,
        key.prefix,
        list(key.scopes),
        key.created_at,
        key.expires_at,
        key.caller.agent and key.caller.agent.id,
    )


async def lock_key_of(connection: Connection, caller: Caller, agent: ActingAgent) -> ApiKey:
    """Return the key of an agent, locked against others who change it.

    Raises:
        NotFound: The user has no such agent that is not deleted.
    """
    row = await connection.fetchrow(
        f"""
        SELECT {_KEY}
          FROM api_keys AS key
         WHERE key.tenant_id = $1 AND key.user_id = $2 AND key.agent_id = $3
           AND key.revoked_at IS NULL
           FOR UPDATE
        """,  # noqa: S608 - a constant of ours
        caller.tenant_id,
        caller.user_id,
        agent.id,
    )
    if row is None:
        raise NotFound("agent")
    return _key(row)


async def renew(connection: Connection, key: ApiKey, prefix: str, expires_at: datetime) -> ApiKey:
    """Note how the newest secret of a key begins, and when the key ends."""
    row = await connection.fetchrow(
        f"""
        UPDATE api_keys AS key
           SET prefix = $4, expires_at = $5
         WHERE key.tenant_id = $1 AND key.user_id = $2 AND key.id = $3
        RETURNING {_KEY}
        """,  # noqa: S608 - a constant of ours
        key.caller.tenant_id,
        key.caller.user_id,
        key.id,
        prefix,
        expires_at,
    )
    return _key(row)


async def end_key(connection: Connection, key: ApiKey, now: datetime) -> None:
    """End a key and everything that was made with it."""
    await _end_secrets(connection, key)
    await connection.execute(
        """
        UPDATE api_keys
           SET revoked_at = $4
         WHERE tenant_id = $1 AND user_id = $2 AND id = $3
        """,
        key.caller.tenant_id,
        key.caller.user_id,
        key.id,
        now,
    )


async def end_all(
    connection: Connection, callers: Iterable[Caller], now: datetime, *, actor: str | None = None
) -> int:
    """End every key of some users, and return how many scripts' keys those were.

    It waits for whoever makes a key, and comes ahead of ending sessions: both lock the user first.
    The keys of scripts are revoked. Those of agents are emptied: nothing opens them until their
    user rotates them, one by one.

    Args:
        connection: The transaction that gives the reason.
        callers: The users.
        now: When.
        actor: Who has them ended; None: the user.
    """
    in_order = sorted(callers, key=lambda caller: caller.user_id)  # two at once do not cross
    return sum([await _end_all_of(connection, each, now, actor) for each in in_order])


async def _end_all_of(
    connection: Connection, caller: Caller, now: datetime, actor: str | None
) -> int:
    await _take_turns(connection, caller)
    rows = await connection.fetch(
        """
        UPDATE api_keys
           SET revoked_at = $3
         WHERE tenant_id = $1 AND user_id = $2 AND revoked_at IS NULL AND agent_id IS NULL
        RETURNING id
        """,
        caller.tenant_id,
        caller.user_id,
        now,
    )
    revoked = [ids.show(ids.API_KEY, row["id"]) for row in rows]
    await audit.record_all(connection, caller, "api_key.revoke", revoked, actor=actor)
    emptied = [ids.show(ids.AGENT, each) for each in await _empty(connection, caller)]
    await audit.record_all(connection, caller, "agent.end_key", emptied, actor=actor)
    return len(revoked)


async def _empty(connection: Connection, caller: Caller) -> list[UUID]:
    """End the secrets of all keys of a user, and return the agents whose keys had some."""
    rows = await connection.fetch(
        """
        WITH ended AS (
            DELETE FROM api_key_secrets
             WHERE tenant_id = $1 AND user_id = $2
            RETURNING grant_id, key_id
        )
        SELECT ended.grant_id, key.agent_id
          FROM ended
          JOIN api_keys AS key ON key.id = ended.key_id
        """,
        caller.tenant_id,
        caller.user_id,
    )
    await end_grants(connection, caller, [row["grant_id"] for row in rows])
    return sorted({row["agent_id"] for row in rows} - {None})


async def replace_grants(
    connection: Connection,
    caller: Caller,
    key_id: UUID | None = None,
    *,
    of_agents: bool = False,
) -> None:
    """Have the access tokens of a user's keys refused, of one of them or of agents'; the keys wait.

    The grants that ended are replaced: keys that may be used again make good tokens.
    """
    rows = await connection.fetch(
        """
        UPDATE api_key_secrets AS secret
           SET grant_id = fresh.id
          FROM (SELECT hash, grant_id, uuidv7() AS id
                  FROM api_key_secrets
                 WHERE tenant_id = $1 AND user_id = $2
                   AND ($3::uuid IS NULL OR key_id = $3)
                   AND (NOT $4 OR key_id IN (SELECT id
                                               FROM api_keys
                                              WHERE tenant_id = $1 AND user_id = $2
                                                AND agent_id IS NOT NULL))) AS fresh
         WHERE secret.hash = fresh.hash
        RETURNING fresh.grant_id
        """,
        caller.tenant_id,
        caller.user_id,
        key_id,
        of_agents,
    )
    await end_grants(connection, caller, [row["grant_id"] for row in rows])


def _key(row: asyncpg.Record) -> ApiKey:
    agent = ActingAgent(row["agent_id"]) if row["agent_id"] else None
    return ApiKey(
        id=row["id"],
        caller=Caller(row["tenant_id"], row["user_id"], agent),
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
           AND agent_id IS NULL
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
           AND key.agent_id IS NULL AND key.expires_at > coalesce($4::timestamptz, '-infinity')
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


async def insert_secret(connection: Connection, key: ApiKey, secret: Secret) -> None:
    """Let a secret open a key until the key ends."""
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


async def retire_secrets(
    connection: Connection, key: ApiKey, now: datetime, overlap: timedelta
) -> None:
    """Let the secrets of a key stay good for a while, or end them at once."""
    if overlap:
        await _let_expire(connection, key, now + overlap)
    else:
        await _end_secrets(connection, key)


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
