"""Erasures in Postgres, as the system role: who is erased is nobody's caller any more."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final
from uuid import UUID, uuid4

import asyncpg

from server import audit, ids, owners
from server.caller import Caller
from server.database import Connection, SystemDatabase
from server.enqueue import enqueue
from server.errors import NotFound, RateLimited, StoreUnavailable
from server.privacy.erasures import Erasure, ErasureState, Removal, Standing, Store, after

ERASE: Final = "user.erase"
"""Kind of the job that goes on with an erasure until nothing is left."""

_ATTEMPTS: Final = 100
"""An erasure is never given up lightly: hours of a store's silence fit in."""
_TRIES: Final = 5
_TRIES_WITHIN: Final = timedelta(hours=1)

_COLUMNS: Final = """
    id, tenant_id, user_id, receipt_id, state, requested_at, erased_at, confirmed_at, removed,
    rounds, ARRAY(SELECT receipt_id
                    FROM erasures AS other
                   WHERE other.begun_with = erasures.id
                   ORDER BY id) AS membership_receipt_ids
"""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an erasure waits for what was under way when it was asked for."""

    settle: timedelta
    """Longer than any call that writes may take."""
    confirm: timedelta
    """Longer than any upload that was allowed may take."""


class ErasureStore:
    """Begins erasures, shows them, and keeps how far they are."""

    def __init__(self, database: SystemDatabase, patience: Patience) -> None:
        self._database = database
        self._patience = patience

    async def find_of(self, caller: Caller) -> Erasure | None:
        """Return the erasure of a user, if there is one."""
        async with self._database.transaction() as connection:
            return await _find_of(connection, caller)

    async def with_receipt(self, receipt_id: UUID) -> Erasure:
        """Return an erasure to whoever knows the id of its receipt.

        Raises:
            NotFound: There is none.
        """
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                f"SELECT {_COLUMNS} FROM erasures WHERE receipt_id = $1",  # noqa: S608 - constants
                receipt_id,
            )
        if row is None:
            raise NotFound("erasure")
        return _erasure(row)

    async def password_hash(self, caller: Caller) -> str | None:
        """Return what the password of a user's account is proved by, before it is tried.

        The try is written down first, so that no number of them at once gets past the limit,
        nor in how many tenants they are made.

        Raises:
            RateLimited: There were too many within the hour.
        """
        async with self._database.transaction() as connection:
            home_id = await connection.fetchval(
                "SELECT coalesce(home_id, id) FROM users WHERE tenant_id = $1 AND id = $2",
                caller.tenant_id,
                caller.user_id,
            )
            await connection.execute(
                "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"erasure proof/{home_id}"
            )
            tries = await connection.fetchval(
                """
                SELECT count(*)
                  FROM users
                  JOIN audit_events USING (tenant_id)
                 WHERE $1 IN (users.id, users.home_id) AND audit_events.user_id = users.id
                   AND action = 'user.prove'
                   AND audit_events.id > (SELECT uuidv7(-$2::interval))
                """,
                home_id,
                _TRIES_WITHIN,
            )
            if tries >= _TRIES:
                raise RateLimited("wrong passwords", _TRIES_WITHIN)
            await audit.record(connection, caller, "user.prove", ids.show(ids.USER, caller.user_id))
            stored: str | None = await connection.fetchval(
                "SELECT password_hash FROM accounts WHERE user_id = $1", home_id
            )
        return stored

    async def begin(self, caller: Caller) -> Erasure:
        """Begin to erase a user, or return the erasure that has begun.

        With the commit nobody logs in as the user, their refresh tokens are gone, no consent of
        theirs stands, and whatever they write is refused, in whichever process. With the home of
        an account all that the account is in other tenants is erased as well. A tenant of which
        they were the last owner has another.

        Raises:
            StoreUnavailable: A writer of theirs takes too long.
        """
        async with self._database.transaction() as connection:
            tenant_ids = await _tenants_of(connection, caller)
            await owners.take_turns(connection, tenant_ids)
            await _wait_for_writers(connection, caller)
            begun = await _find_of(connection, caller)
            if begun is None:
                begun = await self._begin(connection, caller)
                await owners.hand_over(connection, tenant_ids)
        return begun

    async def begin_within(
        self, connection: Connection, caller: Caller, actor: str, receipt_id: UUID
    ) -> None:
        """Begin to erase a user in the transaction of what ends them, as somebody asks.

        Args:
            connection: The transaction.
            caller: Who is erased.
            actor: Who asks.
            receipt_id: Made by chance alone: who knows it may read how far the erasure is.

        Raises:
            StoreUnavailable: A writer of theirs takes too long.
        """
        await _wait_for_writers(connection, caller)
        await self._begin(connection, caller, actor, receipt_id=receipt_id)

    async def _begin(
        self,
        connection: Connection,
        caller: Caller,
        actor: str | None = None,
        begun_with: UUID | None = None,
        receipt_id: UUID | None = None,
    ) -> Erasure:
        row = await connection.fetchrow(
            f"""
            INSERT INTO erasures (id, tenant_id, user_id, receipt_id, begun_with)
            VALUES ($1, $2, $3, $4, $5)
            RETURNING {_COLUMNS}
            """,  # noqa: S608 - constants
            ids.new_id(),
            caller.tenant_id,
            caller.user_id,
            receipt_id or uuid4(),
            begun_with,
        )
        erasure = _erasure(row)
        receipt_ids = await self._begin_memberships(connection, erasure, actor)
        for statement in (
            "DELETE FROM sessions WHERE tenant_id = $1 AND user_id = $2",
            "DELETE FROM accounts WHERE tenant_id = $1 AND user_id = $2",
            "DELETE FROM jobs WHERE tenant_id = $1 AND user_id = $2 AND state = 'waiting'",
        ):
            await connection.execute(statement, caller.tenant_id, caller.user_id)
        await _part(connection, caller)
        await _withdraw_consents(connection, caller)
        user_id = ids.show(ids.USER, caller.user_id)
        await audit.record_all(connection, caller, "user.erase", [user_id], actor=actor)
        await self._ask_for_work(connection, caller, self._patience.settle)
        return replace(erasure, membership_receipt_ids=receipt_ids)

    async def _begin_memberships(
        self, connection: Connection, erasure: Erasure, actor: str | None
    ) -> Sequence[UUID]:
        """Begin to erase what an account is in other tenants than that of its home."""
        rows = await connection.fetch(
            "SELECT tenant_id, id AS user_id FROM users WHERE home_id = $1 ORDER BY id",
            erasure.caller.user_id,
        )
        receipt_ids = []
        for membership in [Caller(**row) for row in rows]:
            await _wait_for_writers(connection, membership)
            begun = await _find_of(connection, membership) or await self._begin(
                connection, membership, actor, begun_with=erasure.id
            )
            receipt_ids.append(begun.receipt_id)
        return receipt_ids

    async def begin_again(self, erasure: Erasure) -> None:
        """Erase a user anew whom a restored backup has brought back."""
        async with self._database.transaction() as connection:
            tenant_ids = await _tenants_of(connection, erasure.caller)
            await owners.take_turns(connection, tenant_ids)
            await _wait_for_writers(connection, erasure.caller)
            await connection.execute(
                """
                INSERT INTO erasures (id, tenant_id, user_id, receipt_id, requested_at,
                                      archived_at)
                VALUES ($1, $2, $3, $4, $5, now())
                    ON CONFLICT (user_id) DO UPDATE
                   SET id = excluded.id, receipt_id = excluded.receipt_id,
                       state = 'erasing', store = 'postgres', place = '', found = 0,
                       erased_at = NULL, confirm_after = NULL, confirmed_at = NULL,
                       archived_at = coalesce(erasures.archived_at, now())
                """,
                erasure.id,
                erasure.caller.tenant_id,
                erasure.caller.user_id,
                erasure.receipt_id,
                erasure.requested_at,
            )
            await self._begin_memberships(connection, erasure, audit.SYSTEM)
            await _part(connection, erasure.caller)
            await owners.hand_over(connection, tenant_ids)
            user_id = ids.show(ids.USER, erasure.caller.user_id)
            await audit.record_all(
                connection, erasure.caller, "user.erase", [user_id], actor=audit.SYSTEM
            )
            await self._ask_for_work(connection, erasure.caller, timedelta())

    async def unarchived(self, limit: int) -> Sequence[Erasure]:
        """Return erasures that only Postgres knows of."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                f"SELECT {_COLUMNS} FROM erasures WHERE archived_at IS NULL ORDER BY id LIMIT $1",  # noqa: S608 - constants
                limit,
            )
        return [_erasure(row) for row in rows]

    async def note_archived(self, erasure: Erasure) -> None:
        """Note that S3 knows of an erasure as well."""
        async with self._database.transaction() as connection:
            await connection.execute(
                "UPDATE erasures SET archived_at = now() WHERE id = $1 AND archived_at IS NULL",
                erasure.id,
            )

    async def standing(self, caller: Caller) -> Standing | None:
        """Return where the round of a user's erasure is; None: there is nothing to do now.

        Raises:
            NotFound: The user is not erased.
            StoreUnavailable: S3 does not know of the erasure yet.
        """
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                """
                SELECT store, place, archived_at IS NOT NULL AS is_archived,
                       state = 'erasing' OR (state = 'erased' AND confirm_after <= now()) AS is_due
                  FROM erasures
                 WHERE tenant_id = $1 AND user_id = $2
                """,
                caller.tenant_id,
                caller.user_id,
            )
        if row is None:
            raise NotFound("erasure")
        if not row["is_due"]:
            return None
        if not row["is_archived"]:
            raise StoreUnavailable("the archive of erasures")
        return Standing(Store(row["store"]), row["place"])

    async def note(self, caller: Caller, standing: Standing, removal: Removal) -> int:
        """Keep what was removed outside of Postgres; see `note_in`."""
        async with self._database.transaction() as connection:
            return await self.note_in(connection, caller, standing, removal)

    async def note_in(
        self, connection: Connection, caller: Caller, standing: Standing, removal: Removal
    ) -> int:
        """Keep what was removed, and go on: to the next place, round, or state.

        Whoever noted from the same place before has moved the round on: then only the count is
        kept.

        Returns:
            How many rounds have been completed.
        """
        following = after(standing, removal)
        moved = following or Standing(Store.POSTGRES, "")
        row = await connection.fetchrow(
            """
            UPDATE erasures
               SET removed = CASE $5::bigint WHEN 0 THEN removed ELSE removed || jsonb_build_object(
                       $6::text, coalesce((removed ->> $6)::bigint, 0) + $5) END,
                   found = found + $5,
                   store = CASE WHEN (store, place) = ($3, $4) THEN $7 ELSE store END,
                   place = CASE WHEN (store, place) = ($3, $4) THEN $8 ELSE place END
             WHERE tenant_id = $1 AND user_id = $2
            RETURNING rounds, (old.store, old.place) = ($3, $4) AS is_moved
            """,
            caller.tenant_id,
            caller.user_id,
            standing.store.value,
            standing.place,
            removal.count,
            removal.place,
            moved.store.value,
            moved.place,
        )
        rounds: int = row["rounds"]
        if following is None and row["is_moved"]:
            rounds = await self._complete_round(connection, caller)
        return rounds

    async def _complete_round(self, connection: Connection, caller: Caller) -> int:
        """Count a round; one that found nothing ends the erasure, or confirms its end."""
        row = await connection.fetchrow(
            """
            UPDATE erasures
               SET rounds = rounds + 1, found = 0,
                   state = CASE WHEN found > 0 THEN state
                                WHEN state = 'erasing' THEN 'erased'
                                ELSE 'confirmed' END,
                   erased_at = CASE WHEN found > 0 THEN erased_at
                                    ELSE coalesce(erased_at, now()) END,
                   confirm_after = CASE WHEN found > 0 THEN confirm_after
                                        ELSE coalesce(confirm_after, now() + $3::interval) END,
                   confirmed_at = CASE WHEN found = 0 AND state = 'erased' THEN now()
                                       ELSE confirmed_at END
             WHERE tenant_id = $1 AND user_id = $2
            RETURNING rounds, old.state = 'erasing' AND new.state = 'erased' AS is_over
            """,
            caller.tenant_id,
            caller.user_id,
            self._patience.confirm,
        )
        if row["is_over"]:
            await self._ask_for_work(connection, caller, self._patience.confirm)
        return int(row["rounds"])

    async def _ask_for_work(self, connection: Connection, caller: Caller, delay: timedelta) -> None:
        """Enqueue the job. It is the system's own: the user's are among what is removed."""
        run_at = await connection.fetchval("SELECT now() + $1::interval", delay)
        user_id = ids.show(ids.USER, caller.user_id)
        await enqueue(
            connection,
            kind=ERASE,
            payload={"tenant_id": ids.show(ids.TENANT, caller.tenant_id), "user_id": user_id},
            unique_key=f"{ERASE}/{user_id}/{run_at.timestamp()}",
            run_at=run_at,
            max_attempts=_ATTEMPTS,
        )


async def _tenants_of(connection: Connection, caller: Caller) -> Sequence[UUID]:
    """Return the tenants that an erasure of a user is about."""
    rows = await connection.fetch(
        "SELECT DISTINCT tenant_id FROM users WHERE id = $1 OR home_id = $1", caller.user_id
    )
    return [row["tenant_id"] for row in rows]


async def _wait_for_writers(connection: Connection, caller: Caller) -> None:
    try:
        await connection.execute("SELECT pg_advisory_xact_lock(erasure_lock($1))", caller.user_id)
    except asyncpg.LockNotAvailableError as error:
        raise StoreUnavailable("a writer of the user's") from error


async def _part(connection: Connection, caller: Caller) -> None:
    """Part a user from an account that is at home elsewhere, and may join the tenant again."""
    await connection.execute(
        "DELETE FROM users WHERE tenant_id = $1 AND id = $2 AND home_id IS NOT NULL",
        caller.tenant_id,
        caller.user_id,
    )


async def _find_of(connection: Connection, caller: Caller) -> Erasure | None:
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM erasures WHERE tenant_id = $1 AND user_id = $2",  # noqa: S608 - constants
        caller.tenant_id,
        caller.user_id,
    )
    return _erasure(row) if row else None


async def _withdraw_consents(connection: Connection, caller: Caller) -> None:
    """Withdraw every consent that stands: whatever asks for one stops at once."""
    await connection.execute(
        """
        INSERT INTO consents (tenant_id, user_id, purpose, version, granted)
        SELECT $1, $2, purpose, 1 + max(version), false
          FROM consents
         WHERE tenant_id = $1 AND user_id = $2
         GROUP BY purpose
        """,
        caller.tenant_id,
        caller.user_id,
    )


def _erasure(row: asyncpg.Record) -> Erasure:
    return Erasure(
        id=row["id"],
        caller=Caller(row["tenant_id"], row["user_id"]),
        receipt_id=row["receipt_id"],
        state=ErasureState(row["state"]),
        requested_at=row["requested_at"],
        erased_at=row["erased_at"],
        confirmed_at=row["confirmed_at"],
        removed=json.loads(row["removed"]),
        rounds=row["rounds"],
        membership_receipt_ids=row["membership_receipt_ids"],
    )
