"""Makes a backup, while the mesh works."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import structlog

from server.backup.manifest import Manifest, Part, Table
from server.backup.postgres import Programs
from server.backup.repository import REFERENCES, Damaged, Repository
from server.backup.sealing import Sealer
from server.backup.signing import Signer
from server.backup.snapshot import Named, Snapshot
from server.blobs import Blobs
from server.clock import Clock, utc_now
from server.errors import NotFound

log = structlog.get_logger()

DATABASE: Final = "database"
CATALOGUE: Final = "catalogue"
CHECKPOINTS: Final = "checkpoints"
PROBES: Final = "probes"

_DUMPED: Final = 0.5
"""How far a backup is when the database is dumped: objects are what takes longest, once."""
_LONGEST_WORD: Final = 64 * 1024

Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Source:
    """What is backed up."""

    database_url: str
    """As a role that reads every row of every table; of a replica, if there is one."""
    primary_url: str
    """Of the database that is written to, as a role that sees all users."""
    blobs: Blobs
    programs: Programs
    checkpoint_key: Callable[[UUID, int], str]
    """Where in S3 the signed checkpoint of a tenant's audit log is."""
    words: Sequence[str]
    """What the keys of objects begin with that say who was erased, and what was withdrawn."""


@dataclass(frozen=True, slots=True)
class Created:
    """A backup that was made."""

    manifest: Manifest
    digest: bytes


@dataclass(slots=True)
class _Objects:
    """What was met so far."""

    count: int = 0
    size_bytes: int = 0
    new_bytes: int = 0
    gone: int = 0
    lost: list[str] = field(default_factory=list)


def new_name(now: datetime) -> str:
    """Return a name for a backup; in their order, names are in the order of time."""
    instant = now.astimezone(UTC)
    return f"{instant:%Y%m%dT%H%M%S}.{instant.microsecond // 1000:03}Z-{secrets.token_hex(3)}"


class Creator:
    """Makes backups of one mesh, one at a time."""

    def __init__(
        self,
        source: Source,
        repository: Repository,
        sealer: Sealer,
        signer: Signer,
        *,
        clock: Clock = utc_now,
    ) -> None:
        self._signer = signer
        self._source = source
        self._repository = repository
        self._sealer = sealer
        self._clock = clock

    async def create(self, backup: str, progress: Progress) -> Created:
        """Make a backup of this name.

        It is none before its manifest is written, the last of all: whatever ends this earlier
        leaves parts that nobody takes for a backup.

        Raises:
            StoreUnavailable: A store does not answer.
            ProgramFailed: pg_dump does not end well.
            BackupFailed: The replica stays behind the database.
        """
        source = self._source
        async with Snapshot.open(source.database_url, source.primary_url) as snapshot:
            transactions = await snapshot.transactions()
            migrations = await snapshot.migrations()
            tables, dump = await self._database(backup, snapshot)
            progress(_DUMPED)
            streams = {
                DATABASE: dump,
                CHECKPOINTS: await self._write(backup, CHECKPOINTS, self._checkpoints(snapshot)),
                PROBES: await self._write(backup, PROBES, snapshot.probes()),
            }
            total = max(1, _objects_in(tables))
            objects = await self._objects(
                backup,
                snapshot,
                streams,
                lambda met: progress(_DUMPED + (1 - _DUMPED) * min(1, met / total)),
            )
        manifest = Manifest(
            id=backup,
            mark=snapshot.mark,
            finished_at=self._clock(),
            migrations=migrations,
            transactions=transactions,
            tables=tables,
            objects=objects.count,
            object_bytes=objects.size_bytes,
            gone=objects.gone,
            lost=len(objects.lost),
            streams=streams,
            new_bytes=objects.new_bytes + _size(streams),
        )
        return Created(manifest, await self._repository.commit(manifest, self._signer))

    async def copy_words(self, target: Blobs) -> int:
        """Copy who was erased to where it outlives the mesh; return how many words are new.

        And what was withdrawn. Services do so as well, before they erase anything, or acknowledge a
        withdrawal. This is for words of old.
        """
        copied = 0
        for directory in self._source.words:
            known = {key async for key in _keys(target, directory)}
            async for key in _keys(self._source.blobs, directory):
                if key not in known:
                    word = await self._source.blobs.get_small(key, longest=_LONGEST_WORD)
                    copied += await target.put_new(key, word or b"")
        return copied

    async def _database(
        self, backup: str, snapshot: Snapshot
    ) -> tuple[Mapping[str, Table], list[Part]]:
        """Dump the database, and digest its tables beside that."""
        async with asyncio.TaskGroup() as group:
            tables = group.create_task(snapshot.tables())
            async with aclosing(snapshot.dump(self._source.programs)) as dump:
                parts = await self._repository.write(backup, DATABASE, dump, self._sealer)
        return tables.result(), parts

    async def _write(self, backup: str, stream: str, chunks: AsyncIterator[bytes]) -> list[Part]:
        return await self._repository.write(backup, stream, chunks, self._sealer)

    async def _checkpoints(self, snapshot: Snapshot) -> AsyncIterator[bytes]:
        """Yield signed checkpoints as lines of JSON."""
        async for sealed in snapshot.checkpoints():
            key = self._source.checkpoint_key(sealed.tenant_id, sealed.position)
            token = await self._source.blobs.get_small(key, longest=_LONGEST_WORD)
            fields = {
                "tenant_id": sealed.tenant_id.hex,
                "position": sealed.position,
                # What is missing is told of by whoever verifies the log, of this mesh or of a copy.
                "token": (token or b"").decode("ascii", "replace"),
            }
            yield _line(fields)

    async def _objects(
        self,
        backup: str,
        snapshot: Snapshot,
        streams: dict[str, list[Part]],
        met: Callable[[int], None],
    ) -> _Objects:
        """Copy what is not there yet, and write down what there is."""
        catalogue = self._repository.writer(backup, CATALOGUE, self._sealer)
        references = self._repository.writer(backup, REFERENCES, None)
        seen, last = _Objects(), ""
        async with aclosing(self._repository.stored_objects()) as stored:
            known = await anext(stored, None)
            async for named in snapshot.objects():
                while known is not None and known < named.sha256:
                    known = await anext(stored, None)
                is_there = named.sha256 in (known, last)
                state = "kept" if is_there else await self._copy(snapshot, named, seen)
                await catalogue.add(_line(_entry(named, state)))
                if state == "kept":
                    seen.count += 1
                    seen.size_bytes += named.size_bytes
                    if named.sha256 != last:
                        await references.add(f"{named.sha256}\n".encode())
                    last = named.sha256
                met(seen.count)
        streams[CATALOGUE] = await catalogue.close()
        streams[REFERENCES] = await references.close()
        return seen

    async def _copy(self, snapshot: Snapshot, named: Named, seen: _Objects) -> str:
        """Copy an object, and return what became of it: kept, gone or lost."""
        chunks = self._source.blobs.chunks(named.key, named.version_id)
        try:
            async with aclosing(chunks):
                seen.new_bytes += await self._repository.write_object(
                    named.sha256, named.size_bytes, chunks, self._sealer
                )
        except (NotFound, Damaged) as error:
            # Whoever deletes removes the row first: then it was meant to go.
            if isinstance(error, NotFound) and not await snapshot.names(named):
                seen.gone += 1
                return "gone"
            log.warning("object not backed up", key=named.key, error=str(error))
            seen.lost.append(named.key)
            return "lost"
        return "kept"


async def _keys(blobs: Blobs, prefix: str) -> AsyncIterator[str]:
    async with aclosing(blobs.pages(prefix)) as pages:
        async for page in pages:
            for key in page:
                yield key


def _entry(named: Named, state: str) -> dict[str, Any]:
    return {
        "table": named.table,
        "tenant_id": named.tenant_id.hex,
        "user_id": named.user_id.hex,
        "id": named.id.hex,
        "size_bytes": named.size_bytes,
        "sha256": named.sha256,
        "state": state,
    }


def _line(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def _objects_in(tables: Mapping[str, Table]) -> int:
    return sum(tables[name].rows for name in ("attachments", "transcripts"))


def _size(streams: Mapping[str, list[Part]]) -> int:
    return sum(part.size_bytes for parts in streams.values() for part in parts)
