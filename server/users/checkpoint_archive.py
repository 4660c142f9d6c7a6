"""The checkpoints of the audit log in S3."""

import asyncio
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

import structlog
from joserfc.jwk import ECKey

from server.blobs import Blobs
from server.errors import StoreUnavailable
from server.users import checkpoints
from server.users.audit_keys import AuditKeys
from server.users.chain import Break
from server.users.checkpoint_store import CheckpointStore, Recorded
from server.users.checkpoints import Checkpoint, CheckpointForged, Witness

log = structlog.get_logger()

_READ_SECONDS: Final = 5.0
"""A verification waits no longer for S3: it has a deadline, and can answer without."""


class Comparison(enum.Enum):
    """Whether a log could be compared with its checkpoints."""

    NONE = "none"
    """No checkpoint was signed yet."""
    COMPARED = "compared"
    UNREACHABLE = "unreachable"
    """S3 or the KMS does not answer."""


@dataclass(frozen=True, slots=True)
class Testimony:
    """What there is to compare a log with."""

    comparison: Comparison
    recorded: Recorded | None
    """The newest checkpoint as the database knows it: what there is to say without S3."""
    witnesses: Sequence[Witness] = ()
    """In order of their places."""
    keys: Mapping[str, ECKey] = field(default_factory=dict)
    """The keys that can be believed, by key id."""

    @property
    def checkpoints(self) -> Sequence[Checkpoint]:
        """The witnesses that are good."""
        return [each.checkpoint for each in self.witnesses if each.checkpoint]


class CheckpointArchive:
    """Writes checkpoints once, and reads them with suspicion."""

    def __init__(self, blobs: Blobs, store: CheckpointStore, keys: AuditKeys) -> None:
        self._blobs = blobs
        self._store = store
        self._keys = keys

    async def put(self, checkpoint: Checkpoint) -> bool:
        """Store a checkpoint and return True; return False if there is one for this place.

        Raises:
            StoreUnavailable: S3 does not answer.
        """
        key = checkpoints.object_key(checkpoint.tenant_id, checkpoint.position)
        return await self._blobs.put_new(key, checkpoint.token.encode())

    async def newest(
        self, tenant_id: UUID, recorded: int | None, keys: Mapping[str, ECKey]
    ) -> Witness | None:
        """Return the newest checkpoint of a tenant, or None if there was never one.

        S3 has the last word. What the database knows saves listing all of them, and is missed
        if it is not there.

        Raises:
            StoreUnavailable: S3 does not answer.
        """
        positions = await self._positions(tenant_id, since=recorded or 0)
        if positions:
            return await self._witness(tenant_id, positions[-1], keys)
        return Witness(recorded, None, checkpoints.is_missing(recorded)) if recorded else None

    async def testimony(self, tenant_id: UUID) -> Testimony:
        """Return the newest checkpoint of a tenant, and some older ones.

        Raises:
            StoreUnavailable: PostgreSQL does not answer.
        """
        recorded = await self._store.recorded(tenant_id)
        try:
            async with asyncio.timeout(_READ_SECONDS):
                keys = await self._keys.known()
                witnesses = await self._witnesses(tenant_id, recorded, keys)
        except (StoreUnavailable, TimeoutError) as error:
            log.warning("audit checkpoints not read", error=repr(error))
            return Testimony(Comparison.UNREACHABLE, recorded)
        comparison = Comparison.COMPARED if witnesses else Comparison.NONE
        return Testimony(comparison, recorded, witnesses, keys)

    async def compare(
        self, tenant_id: UUID, testimony: Testimony, *, reached: int, is_whole: bool
    ) -> Break | None:
        """Compare a chain with what its checkpoints say.

        Args:
            tenant_id: Whose chain it is.
            testimony: What to compare it with.
            reached: The place up to which the chain holds by itself.
            is_whole: Whether it ends there. Otherwise what is known to be broken explains that
                later checkpoints do not agree.

        Raises:
            StoreUnavailable: PostgreSQL does not answer.
        """
        witnesses = [each for each in testimony.witnesses if is_whole or each.position <= reached]
        hashes = await self._store.hashes(tenant_id, [each.position for each in witnesses])
        return checkpoints.compare(witnesses, hashes, reached)

    async def _witnesses(
        self, tenant_id: UUID, recorded: Recorded | None, keys: Mapping[str, ECKey]
    ) -> Sequence[Witness]:
        positions = await self._positions(tenant_id, since=0)
        chosen = checkpoints.spread(positions)
        found = [await self._witness(tenant_id, position, keys) for position in chosen]
        if recorded and recorded.position not in positions:
            gone = Witness(recorded.position, None, checkpoints.is_missing(recorded.position))
            found = sorted([*found, gone], key=lambda witness: witness.position)
        return found

    async def _positions(self, tenant_id: UUID, *, since: int) -> Sequence[int]:
        keys = await self._blobs.list_keys(
            checkpoints.directory(tenant_id),
            after=checkpoints.object_key(tenant_id, since - 1) if since else "",
        )
        positions = (checkpoints.position_of(key) for key in keys)
        return [position for position in positions if position is not None]

    async def _witness(self, tenant_id: UUID, position: int, keys: Mapping[str, ECKey]) -> Witness:
        key = checkpoints.object_key(tenant_id, position)
        token = await self._blobs.get_small(key, longest=checkpoints.LONGEST_BYTES)
        if token is None:
            return Witness(position, None, checkpoints.is_missing(position))
        try:
            checkpoint = checkpoints.read(token.decode("ascii", "replace"), keys)
        except CheckpointForged:
            return Witness(position, None, checkpoints.is_forged(position))
        # A good checkpoint of another tenant or place vouches for nothing here.
        if (checkpoint.tenant_id, checkpoint.position) != (tenant_id, position):
            return Witness(position, None, checkpoints.is_forged(position))
        return Witness(position, checkpoint)
