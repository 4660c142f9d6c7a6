"""Seals the audit log into hash chains, and verifies them."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NoReturn
from uuid import UUID

import structlog

from server.errors import StoreUnavailable
from server.users import chain
from server.users.audit_store import AuditStore, End
from server.users.chain import Break, Head, StoredLink, Walk
from server.users.checkpoint_archive import CheckpointArchive, Testimony

log = structlog.get_logger()

_BATCH: Final = 1000
"""Hashing this many holds the event loop for a few milliseconds."""
_FOR_EVER: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Verification:
    """What a verification found."""

    verified_events: int
    """How many events hold, counted from the beginning of the log."""
    head_hash: bytes | None
    """Hash of the last link; None for an empty log."""
    broken: Break | None
    """The first broken place; None when the log is intact."""
    testimony: Testimony
    """The signed checkpoints that it was compared with."""


class AuditLog:
    """The audit log as chains, one for each tenant.

    Writers append events without waiting for each other. The sealer follows a moment later and
    links what can no longer get a predecessor.
    """

    def __init__(
        self,
        store: AuditStore,
        archive: CheckpointArchive,
        *,
        seal_seconds: float,
        page: int = _BATCH,
    ) -> None:
        self._store = store
        self._archive = archive
        self._seal_seconds = seal_seconds
        self._page = page

    async def run(self) -> NoReturn:
        """Seal again and again. Several processes may: they take turns."""
        while True:
            try:
                await self.seal()
            except (StoreUnavailable, TimeoutError) as error:
                log.warning("audit log not sealed", error=repr(error))
            await asyncio.sleep(self._seal_seconds)

    async def seal(self) -> None:
        """Chain all events that can be chained now."""
        while await self._store.seal(self._page) == self._page:
            pass

    async def verify(self, tenant_id: UUID) -> Verification:
        """Seal, compute a tenant's chain anew from the stored events, and compare.

        What is compared with is stored beside the events, and the checkpoints in S3: only they
        tell of somebody who rewrote events, links and head together and consistently.
        """
        # Ahead of the end of the log, which thereby is never before what they vouch for.
        testimony = await self._archive.testimony(tenant_id)
        await self.seal()
        end = await self._store.end(tenant_id)
        reached, by_itself = await examine(self._store, tenant_id, end, self._page)
        by_checkpoints = await self._archive.compare(
            tenant_id, testimony, reached=reached.position, is_whole=by_itself is None
        )
        broken = chain.first(by_itself, by_checkpoints)
        return Verification(
            verified_events=broken.position - 1 if broken else reached.position,
            head_hash=end.recorded.hash if end.recorded.position else None,
            broken=broken,
            testimony=testimony,
        )

    async def links(self, tenant_id: UUID, *, after: int, limit: int) -> Sequence[StoredLink]:
        """Return links behind a place with their events, for somebody who verifies themselves."""
        return await self._store.links(
            tenant_id, after=min(after, _FOR_EVER), until=_FOR_EVER, limit=limit
        )


async def examine(
    store: AuditStore, tenant_id: UUID, end: End, size: int = _BATCH
) -> tuple[Head, Break | None]:
    """Compare a log with what PostgreSQL itself says of it, so many events at a time."""
    reached, broken = await _walk(store, tenant_id, end, size)
    if broken is None:
        broken = chain.compare_end(reached, end.recorded, end.last_position)
    if broken is None and (place := await store.find_inserted(tenant_id)) is not None:
        broken = Break(place, chain.EVENT_INSERTED)
    return reached, broken


async def _walk(
    store: AuditStore, tenant_id: UUID, end: End, size: int
) -> tuple[Head, Break | None]:
    """Walk to the recorded end, a page at a time."""
    here = Walk(chain.start(tenant_id))
    while here.head.position < end.recorded.position:
        page = await store.links(
            tenant_id,
            after=here.head.position,
            until=end.recorded.position,
            limit=size + 1,
        )
        if not page:
            break
        beyond = page[size] if len(page) > size else None
        there = chain.walk(here, page[:size], beyond)
        if isinstance(there, Break):
            return here.head, there
        here = there
    return here.head, None
