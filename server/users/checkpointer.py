"""Signs checkpoints of the audit log."""

import asyncio
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import structlog
from joserfc.jwk import ECKey

from server.clock import Clock, utc_now
from server.users import checkpoints
from server.users.audit_keys import AuditKeys
from server.users.checkpoint_archive import CheckpointArchive
from server.users.checkpoint_store import CheckpointStore, Moved
from server.users.checkpoints import Witness

log = structlog.get_logger()

_AT_ONCE: Final = 8
"""As many connections as we keep to S3."""


@dataclass(frozen=True, slots=True)
class Page:
    """What became of some heads."""

    signed: int
    """How many checkpoints were written."""
    last: UUID | None
    """The tenant that the next page comes after; None on the last page."""


class Checkpointer:
    """Signs the heads of chains that grew, and stores them in S3.

    Nobody waits for it: with S3 away the log is written and sealed as ever, and the next call that
    succeeds signs what then is the head. Several processes may do the same; whoever comes first
    writes the object.
    """

    def __init__(
        self,
        store: CheckpointStore,
        archive: CheckpointArchive,
        keys: AuditKeys,
        *,
        clock: Clock = utc_now,
    ) -> None:
        self._store = store
        self._archive = archive
        self._keys = keys
        self._clock = clock

    async def sign(self, after: UUID | None, limit: int) -> Page:
        """Sign a page of heads that moved since their last checkpoints, in order of tenants.

        Args:
            after: The tenant that the page before ended with; None for the first page.
            limit: How many heads at most.

        Raises:
            StoreUnavailable: PostgreSQL, the KMS or S3 does not answer. What is signed stays so.
            TimeoutError: S3 does not answer in time.
            UnwrapFailed: As `AuditKeys.signer`.
        """
        await self._keys.rewrap()
        key = await self._keys.signer()
        page = await self._store.moved(after=after, limit=limit)
        places = asyncio.Semaphore(_AT_ONCE)
        try:
            async with asyncio.TaskGroup() as tasks:
                signing = [tasks.create_task(self._sign(moved, key, places)) for moved in page]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        signed = sum(task.result() for task in signing)
        return Page(signed, page[-1].tenant_id if len(page) == limit else None)

    async def _sign(self, moved: Moved, key: ECKey, places: asyncio.Semaphore) -> bool:
        async with places:
            return await self._sign_head(moved, key)

    async def _sign_head(self, moved: Moved, key: ECKey) -> bool:
        """Sign one head, unless its chain is not the one that was signed before."""
        before = await self._archive.newest(
            moved.tenant_id, moved.recorded, await self._keys.known()
        )
        if before and (problem := await self._problem(moved, before)):
            log.error("audit log tampered with", tenant_id=str(moved.tenant_id), problem=problem)
            return False
        if before and before.checkpoint and before.position >= moved.head.position:
            # Another process was faster, or this one ended before it could note what it wrote.
            await self._store.record(before.checkpoint)
            return False
        checkpoint = checkpoints.sign(moved.tenant_id, moved.head, self._clock(), key)
        if written := await self._archive.put(checkpoint):
            await self._store.record(checkpoint)
        return written

    async def _problem(self, moved: Moved, before: Witness) -> str:
        """Return why a chain does not continue its newest checkpoint; empty if it does."""
        if before.checkpoint is None:
            return before.problem
        hashes = await self._store.hashes(moved.tenant_id, [before.position])
        same = hashes.get(before.position) == before.checkpoint.hash
        return "" if same else checkpoints.is_rewritten(before.position)
