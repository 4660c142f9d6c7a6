"""Erasing a user: rounds through all stores, until one finds nothing.

What is to be removed is not listed here, where something new would be forgotten. Every table that
has a column `user_id`, or `email` alone, is gone through, as the catalogue tells them; every object
under the user's prefixes; every key under the user's own. A round removes what it finds and counts
it; one that finds nothing proves that nothing is left, and is the last. Everything may be repeated,
and what is removed stays so: whoever goes on after a crash goes on from what is left.

Kept are the events of the audit log, which hold no text and which a chain of hashes holds together,
and the row that says who was erased.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Final, assert_never

import asyncpg

from server.blobs import Blobs
from server.cache import Redis, out_of_reach, prefix_of
from server.caller import Caller
from server.data_keys import DataKeys
from server.database import Connection, SystemDatabase
from server.privacy.erasure_store import ErasureStore
from server.privacy.erasures import Removal, Standing, Store

KEPT: Final = frozenset({"audit_events", "erasures"})
"""Tables whose rows stay."""

_KEYS_A_LOOK: Final = 10_000


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose rows are users'."""

    name: str
    """As it is written in SQL."""
    condition: str
    """Which rows are a user's: of the tenant $1 and the user $2."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an erasure is after a call."""

    is_done: bool
    removed: int
    rounds: int


class Eraser:
    """Removes what is left of users, some of it a call.

    Every method raises StoreUnavailable when a store does not answer.
    """

    def __init__(
        self,
        database: SystemDatabase,
        store: ErasureStore,
        data_keys: DataKeys,
        blobs: Blobs,
        redis: Redis,
        *,
        object_kinds: Sequence[str],
    ) -> None:
        """Prepare to erase; keys of users' objects begin with a kind, a tenant and a user."""
        self._database = database
        self._store = store
        self._data_keys = data_keys
        self._blobs = blobs
        self._redis = redis
        self._object_kinds = object_kinds

    async def erase(self, caller: Caller, limit: int) -> Progress:
        """Remove up to `limit` things of a user, or look at a place that has none.

        Raises:
            NotFound: The user is not to be erased.
        """
        standing = await self._store.standing(caller)
        if standing is None:
            return Progress(is_done=True, removed=0, rounds=0)
        match standing.store:
            case Store.POSTGRES:
                return await self._erase_rows(caller, standing, limit)
            case Store.OBJECTS:
                removal = await self._erase_objects(caller, standing.place, limit)
            case Store.UPLOADS:
                removal = await self._erase_uploads(caller)
            case Store.VALKEY:
                removal = await self._erase_keys(caller, standing.place)
            case _:
                assert_never(standing.store)
        rounds = await self._store.note(caller, standing, removal)
        return Progress(is_done=False, removed=removal.count, rounds=rounds)

    async def _erase_rows(self, caller: Caller, standing: Standing, limit: int) -> Progress:
        """Remove rows of one table; what they were is counted in the same transaction."""
        async with self._database.transaction() as connection:
            tables = await erasable_tables(connection)
            name = standing.place or next(iter(tables))
            # A table that is gone since has no rows.
            count = (
                await self._delete(connection, caller, tables[name], limit) if name in tables else 0
            )
            following = name if count == limit else _next(list(tables), name)
            removal = Removal(f"postgres/{name}", count, following)
            rounds = await self._store.note_in(connection, caller, standing, removal)
        return Progress(is_done=False, removed=count, rounds=rounds)

    async def _delete(
        self, connection: Connection, caller: Caller, table: Table, limit: int
    ) -> int:
        if table.name == "user_keys":
            # What it sealed opens no more, here and in backups whose master key goes.
            return await self._data_keys.shred(connection, caller)
        deleted = await connection.execute(
            f"""
            DELETE FROM {table.name}
             WHERE ctid = ANY (ARRAY(SELECT ctid
                                       FROM {table.name}
                                      WHERE {table.condition}
                                      LIMIT $3))
            """,  # noqa: S608 - names from the catalogue, as it quotes them
            caller.tenant_id,
            caller.user_id,
            limit,
        )
        return int(deleted.removeprefix("DELETE "))

    async def _erase_objects(self, caller: Caller, place: str, limit: int) -> Removal:
        """Remove versions of objects of one kind."""
        kind, _, token = place.partition(" ")
        kind = kind or self._object_kinds[0]
        page = await self._blobs.versions(token=token, limit=limit, prefix=_prefix(kind, caller))
        for version in page.versions:
            await self._blobs.remove_version(version.key, version.version_id)
        following = _next(self._object_kinds, kind)
        if page.next_token:
            following = f"{kind} {page.next_token}"
        return Removal(f"objects/{kind}", len(page.versions), following)

    async def _erase_uploads(self, caller: Caller) -> Removal:
        """Give up uploads in parts of all kinds."""
        count = 0
        for kind in self._object_kinds:
            for upload in await self._blobs.unfinished(_prefix(kind, caller)):
                await self._blobs.abort_upload(upload.key, upload.upload_id)
                count += 1
        return Removal("uploads", count, "")

    async def _erase_keys(self, caller: Caller, place: str) -> Removal:
        """Remove the user's keys among the next ten thousand of all."""
        pattern = f"{prefix_of(caller)}*"
        with out_of_reach():
            cursor, keys = await self._redis.scan(int(place or "0"), pattern, _KEYS_A_LOOK)
            count = int(await self._redis.unlink(*keys)) if keys else 0
        return Removal("valkey", count, str(cursor) if cursor else "")


async def erasable_tables(connection: Connection) -> Mapping[str, Table]:
    """Return the tables whose rows an erasure removes, by name, those that refer to others first.

    A partitioned table is its partitions.
    """
    rows = await connection.fetch(
        """
        SELECT DISTINCT ON (class.relname)
               quote_ident(class.relname) AS name, attribute.attname AS owner_column,
               ARRAY(SELECT quote_ident(referred.relname)
                       FROM pg_constraint AS reference
                       JOIN pg_class AS referred ON referred.oid = reference.confrelid
                      WHERE reference.conrelid = class.oid AND reference.contype = 'f'
                        AND referred.oid <> class.oid) AS refers_to
          FROM pg_class AS class
          JOIN pg_attribute AS attribute ON attribute.attrelid = class.oid
         WHERE class.relnamespace = 'public'::regnamespace AND class.relkind = 'r'
           AND attname IN ('user_id', 'email')
         ORDER BY class.relname, attname = 'user_id' DESC
        """
    )
    tables = {row["name"]: Table(row["name"], _condition(row)) for row in rows}
    order = TopologicalSorter[str]()
    for row in rows:
        order.add(row["name"])
        if row["owner_column"] == "email" and row["name"] != "users":
            order.add("users", row["name"])
        for referred in row["refers_to"]:
            order.add(referred, row["name"])
    return {name: tables[name] for name in order.static_order() if name in tables.keys() - KEPT}


def _condition(row: asyncpg.Record) -> str:
    if row["name"] == "users":
        return "tenant_id = $1 AND id = $2"
    if row["owner_column"] == "user_id":
        return "tenant_id = $1 AND user_id = $2"
    # As long as there is the user; they go last.
    return "email IN (SELECT email FROM users WHERE tenant_id = $1 AND id = $2)"


def _prefix(kind: str, caller: Caller) -> str:
    return f"{kind}/{caller.tenant_id.hex}/{caller.user_id.hex}/"


def _next(places: Sequence[str], place: str) -> str:
    """Return the place after one, or nothing if it is the last; of one that is gone, the first."""
    if place not in places:
        return places[0]
    following = places[places.index(place) + 1 :]
    return following[0] if following else ""
