"""Signs checkpoints of the audit log."""

import asyncio
from typing import Final, NoReturn

import structlog
from joserfc.jwk import ECKey

from server.clock import Clock, utc_now
from server.errors import StoreUnavailable
from server.kms import UnwrapFailed
from server.users import checkpoints
from server.users.audit_keys import AuditKeys
from server.users.checkpoint_archive import CheckpointArchive
from server.users.checkpoint_store import CheckpointStore, Moved
from server.users.checkpoints import Witness

log = structlog.get_logger()

_AT_ONCE: Final = 8
"""As many connections as we keep to S3."""


class Checkpointer:
    """Signs the heads of chains that grew, and stores them in S3.

    It waits for nobody and nobody waits for it: with S3 away the log is written and sealed as
    ever, and the next round that succeeds signs what then is the head. Several processes may do
    the same; whoever comes first writes the object.
    """

    def __init__(
        self,
        store: CheckpointStore,
        archive: CheckpointArchive,
        keys: AuditKeys,
        *,
        every_seconds: float,
        clock: Clock = utc_now,
    ) -> None:
        self._store = store
        self._archive = archive
        self._keys = keys
        self._every_seconds = every_seconds
        self._clock = clock

    async def run(self) -> NoReturn:
        """Sign again and again."""
        while True:
            try:
                if written := await self.sign_all():
                    log.info("audit checkpoints signed", checkpoints=written)
            except* (StoreUnavailable, TimeoutError, UnwrapFailed) as problems:
                log.warning("audit checkpoints not signed", error=repr(problems.exceptions))
            await asyncio.sleep(self._every_seconds)

    async def sign_all(self) -> int:
        """Sign every head that moved since its last checkpoint; return how many were signed.

        Raises:
            StoreUnavailable: PostgreSQL or the KMS does not answer.
            ExceptionGroup: Of such, when S3 does not answer.
            UnwrapFailed: As `AuditKeys.signer`.
        """
        await self._keys.rewrap()
        key = await self._keys.signer()
        signed, after = 0, None
        while page := await self._store.moved(after=after, limit=_AT_ONCE):
            async with asyncio.TaskGroup() as tasks:
                signing = [tasks.create_task(self._sign(moved, key)) for moved in page]
            signed += sum(task.result() for task in signing)
            after = page[-1].tenant_id
        return signed

    async def _sign(self, moved: Moved, key: ECKey) -> bool:
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
