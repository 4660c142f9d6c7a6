"""Data keys: each user has one, which encrypts what they marked as sensitive.

The database holds it wrapped by the key manager (`server.kms`); the plain key lives in the memory
of a process, for a minute at most. Every use looks for the key's row first: where the row is gone
the key is refused, whatever processes still remember.

What shredding reaches: with its row a key is gone from the database, and content that was sealed
with it opens no more, here at once and in other processes as well; their memory forgets it within
the minute. A copy of the database made before holds the wrapped key, and opens until the master
key that wrapped it is destroyed too: rotate the master key, have the data keys wrapped anew (the
job "keys.rewrap"), and remove the old one from the file, or trim it in Vault.
"""

import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

import structlog

from server import ids
from server.caller import Caller
from server.database import Connection, Database
from server.errors import ContentUnreadable
from server.kms import Kms, UnwrapFailed

log = structlog.get_logger()

_KEY_BYTES: Final = 32
_REMEMBERED_SECONDS: Final = 60.0
_REMEMBERED_KEYS: Final = 1000


@dataclass(frozen=True, slots=True)
class _Stored:
    """A key as the database holds it."""

    id: UUID
    wrapped: bytes


class DataKeys:
    """The data keys of all users, each in its user's transactions."""

    def __init__(
        self, database: Database, kms: Kms, seconds: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._kms = kms
        self._remembered = _Remembered(seconds)

    async def key_of(self, connection: Connection, caller: Caller) -> bytes:
        """Return the caller's key to seal and open with; make it if there is none.

        Of transactions that make one at the same time all but the first wait, and get its key.
        Call it before the transaction locks other rows, and `prepare` before the transaction.

        Returns:
            32 bytes.

        Raises:
            ContentUnreadable: There is a key, and it cannot be unwrapped.
            StoreUnavailable: The key manager does not answer.
        """
        stored = await _read(connection, caller)
        if stored is None:
            stored = await self._insert(connection, caller, await self._make(caller))
        return await self._plain(caller, stored)

    async def existing_key_of(self, caller: Caller) -> bytes:
        """Return the caller's key to open with, in a round trip of its own; see `key_of`.

        Raises:
            ContentUnreadable: There is none, or it cannot be unwrapped.
            StoreUnavailable: The key manager does not answer.
        """
        stored = await self._find(caller)
        if stored is None:
            raise ContentUnreadable
        return await self._plain(caller, stored)

    async def prepare(self, caller: Caller) -> None:
        """Make and unwrap the caller's key, so that `key_of` need not ask the key manager.

        A key manager that is slow then keeps no connection and no lock from others.

        Raises:
            ContentUnreadable: There is a key, and it cannot be unwrapped.
            StoreUnavailable: The key manager does not answer.
        """
        stored = await self._find(caller)
        if stored is None:
            made = await self._make(caller)
            async with self._database.transaction(caller) as connection:
                stored = await self._insert(connection, caller, made)
        await self._plain(caller, stored)

    async def shred(self, connection: Connection, caller: Caller) -> int:
        """Destroy a user's key, with the commit of a system transaction.

        What it sealed can never be opened again, also when the user is given a new key later.

        Returns:
            1, or 0 if there was none.
        """
        deleted = await connection.execute(
            "DELETE FROM user_keys WHERE tenant_id = $1 AND user_id = $2",
            caller.tenant_id,
            caller.user_id,
        )
        self._remembered.forget(caller)
        return int(deleted.removeprefix("DELETE "))

    async def _find(self, caller: Caller) -> _Stored | None:
        rows = await self._database.fetch(
            caller,
            """
            SELECT id, wrapped
              FROM user_keys
             WHERE tenant_id = caller.tenant_id AND user_id = caller.user_id
            """,
        )
        return _Stored(rows[0]["id"], rows[0]["wrapped"]) if rows else None

    async def _make(self, caller: Caller) -> _Stored:
        """Return a new key, wrapped. It is nobody's until it is inserted."""
        plain = os.urandom(_KEY_BYTES)
        return _Stored(ids.new_id(), await self._kms.wrap(plain, context=context_of(caller)))

    async def _insert(self, connection: Connection, caller: Caller, made: _Stored) -> _Stored:
        """Insert a key unless there is one, and return the one that is there then."""
        await connection.execute(
            """
            INSERT INTO user_keys (tenant_id, user_id, id, wrapped, kms_version)
            VALUES ($1, $2, $3, $4, $5)
                ON CONFLICT (user_id, tenant_id) DO NOTHING
            """,
            caller.tenant_id,
            caller.user_id,
            made.id,
            made.wrapped,
            self._kms.version_of(made.wrapped),
        )
        # Another's, if it was faster: its commit was waited for, and this statement sees it.
        stored = await _read(connection, caller)
        if stored is None:  # shredded between the two statements
            raise ContentUnreadable
        return stored

    async def _plain(self, caller: Caller, stored: _Stored) -> bytes:
        plain = self._remembered.get(caller, stored.id)
        if plain is None:
            try:
                plain = await self._kms.unwrap(stored.wrapped, context=context_of(caller))
            except UnwrapFailed as error:
                log.exception("data key not unwrapped", key=str(stored.id))
                raise ContentUnreadable from error
            self._remembered.put(caller, stored.id, plain)
        return plain


def context_of(caller: Caller) -> bytes:
    """Return what a user's data key is bound to when it is wrapped."""
    return f"data key of {caller.tenant_id}/{caller.user_id}".encode()


async def _read(connection: Connection, caller: Caller) -> _Stored | None:
    row = await connection.fetchrow(
        "SELECT id, wrapped FROM user_keys WHERE tenant_id = $1 AND user_id = $2",
        caller.tenant_id,
        caller.user_id,
    )
    return _Stored(row["id"], row["wrapped"]) if row else None


@dataclass(frozen=True, slots=True)
class _Plain:
    key_id: UUID
    forget_at: float
    secret: bytes = field(repr=False)


class _Remembered:
    """Keys that were unwrapped of late, the latest last."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self._keys: OrderedDict[Caller, _Plain] = OrderedDict()

    def get(self, caller: Caller, key_id: UUID) -> bytes | None:
        """Return a user's key if it is this one."""
        self._forget_old()
        plain = self._keys.get(caller)
        return plain.secret if plain and plain.key_id == key_id else None

    def put(self, caller: Caller, key_id: UUID, secret: bytes) -> None:
        """Remember a key for a minute, or until many others came after it."""
        self.forget(caller)
        self._keys[caller] = _Plain(key_id, self._seconds() + _REMEMBERED_SECONDS, secret)
        if len(self._keys) > _REMEMBERED_KEYS:
            self._keys.popitem(last=False)

    def forget(self, caller: Caller) -> None:
        self._keys.pop(caller, None)

    def _forget_old(self) -> None:
        now = self._seconds()
        while self._keys and next(iter(self._keys.values())).forget_at <= now:
            self._keys.popitem(last=False)
