"""What uploads and deletions leave behind in the object store, and how it goes.

An object is kept as long as a row names it: the version that was checked, or, while an upload is
pending, whatever was uploaded. Everything else is an orphan once it is older than any write that
might still be under way. Each page may be repeated, by two at once too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog

from server import audit, ids
from server.blobs import Blobs, UnfinishedUpload, Version
from server.caller import Caller
from server.clock import Clock
from server.database import Connection, SystemDatabase
from server.errors import StoreUnavailable
from server.memory.objects import Kind, ObjectName, doom

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Swept:
    """What became of a page."""

    removed: int
    next_token: str
    """Of the page after this one; empty on the last page."""


class Sweep:
    """Removes orphans of all users, a page a call.

    Every method raises StoreUnavailable when a store does not answer.
    """

    def __init__(
        self,
        database: SystemDatabase,
        blobs: Blobs,
        clock: Clock,
        *,
        url_lifetime: timedelta,
        margin: timedelta,
    ) -> None:
        """Prepare to sweep.

        Args:
            database: Sees all tenants.
            blobs: The bucket.
            clock: Tells the time.
            url_lifetime: How long an announced file may be uploaded.
            margin: What is younger may still be written: it is never removed.
        """
        self._database = database
        self._blobs = blobs
        self._clock = clock
        self._url_lifetime = url_lifetime
        self._margin = margin

    async def expired(self, limit: int) -> Swept:
        """Delete attachments whose bytes did not come in time, and doom their objects."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                DELETE FROM attachments
                 WHERE state = 'pending'
                   AND (user_id, id) IN (SELECT user_id, id
                                           FROM attachments
                                          WHERE state = 'pending' AND created_at < $1
                                          ORDER BY created_at
                                          LIMIT $2)
                RETURNING tenant_id, user_id, id
                """,
                self._clock() - self._url_lifetime - self._margin,
                limit,
            )
            names = [
                ObjectName(Kind.ATTACHMENT, Caller(row["tenant_id"], row["user_id"]), row["id"])
                for row in rows
            ]
            await doom(connection, names)
            await _record_expired(connection, names)
        return Swept(len(names), "again" if len(names) == limit else "")

    async def doomed(self, after: str, limit: int) -> Swept:
        """Remove objects whose rows are deleted, in order of their keys.

        One that refuses to go stands in the way of none that follows; only when all do, S3 is
        taken to be down. Keys of other kinds are
        left alone: who can write to the table must not be able to erase signed checkpoints.
        """
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                SELECT object_key
                  FROM doomed_objects
                 WHERE object_key > $1
                 ORDER BY object_key
                 LIMIT $2
                """,
                after,
                limit,
            )
        keys = [row["object_key"] for row in rows]
        erased = await self._erase([key for key in keys if ObjectName.parse(key)])
        async with self._database.transaction() as connection:
            await connection.execute(
                "DELETE FROM doomed_objects WHERE object_key = ANY ($1)", erased
            )
        return Swept(len(erased), keys[-1] if len(keys) == limit else "")

    async def _erase(self, keys: Sequence[str]) -> list[str]:
        """Erase objects and return the keys of those that are gone."""
        erased, failure = [], None
        for key in keys:
            try:
                await self._blobs.erase(key)
            except StoreUnavailable as error:
                failure = error
                log.warning("object not erased", key=key, error=str(error))
            else:
                erased.append(key)
        if failure and not erased:
            raise failure
        return erased

    async def orphans(self, token: str, limit: int) -> Swept:
        """Remove versions of objects that no row names."""
        page = await self._blobs.versions(token=token, limit=limit)
        old = [version for version in page.versions if self._is_old(version.modified_at)]
        names = {version.key: name for version in old if (name := ObjectName.parse(version.key))}
        kept = await self._kept(list(names.values()))
        orphans = [
            version
            for version in old
            if version.key in names and _is_orphan(version, names[version.key], kept)
        ]
        for orphan in orphans:
            await self._blobs.remove_version(orphan.key, orphan.version_id)
        return Swept(len(orphans), page.next_token)

    async def uploads(self) -> Swept:
        """Give up uploads in parts that no pending attachment names."""
        old = [each for each in await self._blobs.unfinished() if self._is_old(each.begun_at)]
        named = await self._named(old)
        orphans = [
            each for each in old if ObjectName.parse(each.key) and each.upload_id not in named
        ]
        for orphan in orphans:
            await self._blobs.abort_upload(orphan.key, orphan.upload_id)
        return Swept(len(orphans), "")

    def _is_old(self, instant: datetime) -> bool:
        return instant < self._clock() - self._margin

    async def _kept(self, names: Sequence[ObjectName]) -> dict[ObjectName, str | None]:
        """Return which of the objects have a row, and the version that it names, if any."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                WITH asked AS (
                    SELECT *
                      FROM unnest($1::text[], $2::uuid[], $3::uuid[], $4::uuid[])
                           AS asked (kind, tenant_id, user_id, id)
                )
                SELECT kind, tenant_id, user_id, id, version_id
                  FROM asked
                  JOIN attachments USING (tenant_id, user_id, id)
                 WHERE kind = 'attachments'
                 UNION ALL
                SELECT kind, tenant_id, user_id, id, version_id
                  FROM asked
                  JOIN transcripts USING (tenant_id, user_id, id)
                 WHERE kind = 'transcripts'
                 UNION ALL
                SELECT kind, tenant_id, user_id, id, version_id
                  FROM asked
                  JOIN exports USING (tenant_id, user_id, id)
                 WHERE kind = 'exports'
                """,
                [name.kind for name in names],
                [name.owner.tenant_id for name in names],
                [name.owner.user_id for name in names],
                [name.id for name in names],
            )
        return {
            ObjectName(Kind(row["kind"]), Caller(row["tenant_id"], row["user_id"]), row["id"]): row[
                "version_id"
            ]
            for row in rows
        }

    async def _named(self, uploads: Sequence[UnfinishedUpload]) -> set[str]:
        """Return the ids of the uploads that pending attachments name."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                SELECT upload_id
                  FROM attachments
                 WHERE state = 'pending' AND upload_id = ANY ($1)
                """,
                [each.upload_id for each in uploads],
            )
        return {row["upload_id"] for row in rows}


def _is_orphan(version: Version, name: ObjectName, kept: dict[ObjectName, str | None]) -> bool:
    """Tell whether no row names a version; a row without one names all."""
    return name not in kept or kept[name] not in (None, version.version_id)


async def _record_expired(connection: Connection, names: Sequence[ObjectName]) -> None:
    by_owner: dict[Caller, list[str]] = {}
    for name in names:
        by_owner.setdefault(name.owner, []).append(ids.show(ids.ATTACHMENT, name.id))
    for owner, shown in by_owner.items():
        await audit.record_all(connection, owner, "attachment.expire", shown, actor=audit.SYSTEM)
