"""Fills an empty database and an empty bucket from a backup."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import asyncpg
import structlog

from server.backup.creating import CATALOGUE, CHECKPOINTS, DATABASE
from server.backup.manifest import Manifest
from server.backup.postgres import Programs, connect
from server.backup.repository import Damaged, Repository
from server.backup.sealing import Unsealer
from server.backup.snapshot import Named
from server.blobs import Blobs
from server.errors import NotFound

log = structlog.get_logger()

_NUMBERS_APART: Final = 2**32
"""A cluster numbers its transactions from a multiple of it: more than were ever lost."""
_TYPE: Final = "application/octet-stream"
_EVERYTHING: Final = ("attachments/", "transcripts/", "exports/", "audit/")
"""What the keys of a mesh's objects begin with, without the words of who was erased."""


class NotEmpty(Exception):
    """There is a mesh already where one was to be restored."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An object, as the catalogue of a backup has it."""

    named: Named
    state: str
    """kept; gone: deleted while the backup was made; lost: missing when it was made."""


@dataclass(frozen=True, slots=True)
class Objects:
    """What became of the objects of a backup."""

    restored: int
    size_bytes: int
    left_out: int
    """Of users who are erased."""
    damages: Sequence[str]


async def choose(repository: Repository, point: str) -> str:
    """Return the backup that a point names.

    Args:
        repository: Where backups are.
        point: The name of one; or an instant with time zone, for the newest one whose mark is not
            after it; or nothing, for the newest of all.

    Raises:
        NotFound: There is none.
    """
    names = await repository.ids()
    if point in names:
        return point
    try:
        instant = datetime.fromisoformat(point) if point else None
    except ValueError as error:
        raise NotFound("backup") from error
    if instant and instant.tzinfo is None:
        raise NotFound("backup; an instant needs its time zone, such as 2026-05-04T12:00:00Z")
    for name in reversed(names):
        if instant is None or (await repository.manifest(name))[0].mark <= instant:
            return name
    raise NotFound("backup")


async def load(
    repository: Repository, unsealer: Unsealer, manifest: Manifest, programs: Programs, url: str
) -> None:
    """Fill an empty database, and go on numbering transactions after all that were ever numbered.

    Args:
        repository: Where the backup is.
        unsealer: Holds a key that opens it.
        manifest: Of the backup.
        programs: Of PostgreSQL.
        url: Of the database, as the owner of its tables.

    Raises:
        Damaged: A part of the dump is missing, or is not what was written.
        KeyRefused: The key does not open it.
        ProgramFailed: The dump is not taken. Then the database is as empty as it was.
    """
    async with aclosing(repository.read(manifest, DATABASE, unsealer)) as dump:
        await programs.restore(url, dump)
    async with connect(url) as connection:
        await renumber(connection, manifest)
        # Without statistics the first statements would be planned for empty tables.
        await connection.execute("ANALYZE")


async def renumber(connection: asyncpg.Connection, manifest: Manifest) -> None:
    """Have transactions numbered anew, above all numbers that the lost mesh may have given.

    A number orders the audit log and the feed of changes, and readers remember it. Doing it again
    changes nothing.
    """
    before = (manifest.transactions.begun // _NUMBERS_APART + 1) * _NUMBERS_APART
    lost_from = manifest.transactions.ended
    async with connection.transaction():
        # Constants of functions: what is planned with them reads no table. Both are integers.
        await connection.execute(
            f"""
            CREATE OR REPLACE FUNCTION transactions_before() RETURNS bigint
                LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN {before:d}::bigint;
            CREATE OR REPLACE FUNCTION transactions_lost_from() RETURNS xid8
                LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN '{lost_from:d}'::xid8;
            """
        )


async def is_empty(url: str, blobs: Blobs) -> bool:
    """Tell whether neither a database nor a bucket has anything of a mesh."""
    async with connect(url) as connection:
        if await has_tables(connection):
            return False
    for prefix in _EVERYTHING:
        async with aclosing(blobs.pages(prefix)) as pages:
            if await anext(pages, None):
                return False
    return True


async def has_tables(connection: asyncpg.Connection) -> bool:
    """Tell whether a database has tables of a mesh."""
    found: bool = await connection.fetchval(
        """
        SELECT EXISTS (SELECT FROM pg_class
                        WHERE relnamespace = 'public'::regnamespace AND relkind = 'r')
        """
    )
    return found


async def catalogue(
    repository: Repository, unsealer: Unsealer, manifest: Manifest
) -> AsyncGenerator[Entry, None]:
    """Yield the objects of a backup in order of their digests."""
    async with aclosing(lines(repository, unsealer, manifest, CATALOGUE)) as entries:
        async for fields in entries:
            state = fields.pop("state")
            uuids = {name: UUID(fields[name]) for name in ("tenant_id", "user_id", "id")}
            yield Entry(Named(**fields | uuids, version_id=None), state)


async def lines(
    repository: Repository, unsealer: Unsealer, manifest: Manifest, stream: str
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the lines of a stream of JSON.

    Raises:
        Damaged: A part is missing, or is not what was written.
        KeyRefused: The key does not open it.
    """
    rest = b""
    async with aclosing(repository.read(manifest, stream, unsealer)) as parts:
        async for part in parts:
            *whole, rest = (rest + part).split(b"\n")
            for line in whole:
                yield json.loads(line)


class Restorer:
    """Puts the objects of a backup where its database expects them."""

    def __init__(
        self,
        repository: Repository,
        unsealer: Unsealer,
        blobs: Blobs,
        checkpoint_key: Callable[[UUID, int], str],
    ) -> None:
        self._repository = repository
        self._unsealer = unsealer
        self._blobs = blobs
        self._checkpoint_key = checkpoint_key

    async def objects(self, manifest: Manifest, erased: Collection[UUID]) -> Objects:
        """Write every object of the backup but those of erased users.

        One that is damaged is left out and named; the others are as they were.
        """
        restored, size, left_out, damages = 0, 0, 0, list[str]()
        async with aclosing(catalogue(self._repository, self._unsealer, manifest)) as entries:
            async for entry in entries:
                named = entry.named
                if entry.state != "kept":
                    continue
                if named.user_id in erased:
                    left_out += 1
                    continue
                try:
                    await self._put(named)
                except Damaged as error:
                    log.warning("object not restored", key=named.key, error=str(error))
                    damages.append(str(error))
                else:
                    restored, size = restored + 1, size + named.size_bytes
        return Objects(restored, size, left_out, damages)

    async def checkpoints(self, manifest: Manifest) -> int:
        """Write the signed checkpoints of the audit log, and return how many these are."""
        count = 0
        stream = lines(self._repository, self._unsealer, manifest, CHECKPOINTS)
        async with aclosing(stream) as checkpoints:
            async for fields in checkpoints:
                key = self._checkpoint_key(UUID(fields["tenant_id"]), fields["position"])
                count += await self._blobs.put_new(key, fields["token"].encode())
        return count

    async def gone(self, manifest: Manifest) -> AsyncIterator[Named]:
        """Yield what was deleted while the backup was made."""
        async with aclosing(catalogue(self._repository, self._unsealer, manifest)) as entries:
            async for entry in entries:
                if entry.state == "gone":
                    yield entry.named

    async def _put(self, named: Named) -> None:
        stream = self._repository.read_object(named.sha256, named.size_bytes, self._unsealer)
        async with aclosing(stream) as parts:
            first = await anext(parts)
            second = await anext(parts, None)
            if second is None:
                await self._blobs.put(named.key, first, _TYPE)
                return
            upload_id = await self._blobs.begin_upload(named.key)
            written = [
                await self._blobs.put_part(named.key, upload_id, 1, first),
                await self._blobs.put_part(named.key, upload_id, 2, second),
            ]
            async for part in parts:
                number = len(written) + 1
                written.append(await self._blobs.put_part(named.key, upload_id, number, part))
        await self._blobs.complete_upload(named.key, upload_id, written)


async def adopt(connection: asyncpg.Connection, gone: AsyncIterator[Named]) -> Mapping[str, int]:
    """Make the database that of a new mesh, and return how many rows of which table that changed.

    Versions of objects are the new bucket's. Uploads that were under way, and exports, are over.
    Nobody is logged in: a log-out or a stolen token may be among what was lost.

    Args:
        connection: As the owner of the tables.
        gone: The objects that were deleted while the backup was made: their rows go as well.
    """
    changed: dict[str, int] = {}
    async with connection.transaction():
        # The owner sees no rows of users either, but for the time of this transaction.
        for table in _ADOPTED:
            await connection.execute(f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY")
        async for named in gone:
            await connection.execute(
                f"DELETE FROM {named.table} WHERE tenant_id = $1 AND user_id = $2 AND id = $3",  # noqa: S608 - one of two names
                named.tenant_id,
                named.user_id,
                named.id,
            )
        for what, statement in _ADOPTION.items():
            status = await connection.execute(statement)
            changed[what] = int(status.rsplit(" ", 1)[1])
        for table in _ADOPTED:
            await connection.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
    return changed


_ADOPTED: Final = ("attachments", "transcripts", "exports", "sessions")
_ADOPTION: Final[Mapping[str, str]] = {
    "attachments": "UPDATE attachments SET version_id = NULL WHERE version_id IS NOT NULL",
    "transcripts": "UPDATE transcripts SET version_id = NULL WHERE version_id IS NOT NULL",
    "uploads": "DELETE FROM attachments WHERE state = 'pending'",
    "exports": "DELETE FROM exports",
    "sessions": "DELETE FROM sessions",
}
