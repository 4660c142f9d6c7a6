"""The keys that sign checkpoints of the audit log.

They are not those of access tokens, which last for days: a checkpoint must be verifiable for as
long as the log exists. The newest key signs, all that ever signed stay known.
"""

import json
from collections.abc import Mapping, Sequence

import structlog
from joserfc.jwk import ECKey

from server.clock import Clock, utc_now
from server.kms import Kms, UnwrapFailed
from server.tokens import ALGORITHM
from server.users.checkpoint_store import AuditKey, CheckpointStore

log = structlog.get_logger()


class AuditKeys:
    """Makes the keys, and unwraps those that the KMS of this mesh has wrapped.

    Only what unwraps is believed, the public half included. Who writes a key of their own into
    the database has gained nothing.
    """

    def __init__(self, store: CheckpointStore, kms: Kms, *, clock: Clock = utc_now) -> None:
        self._store = store
        self._kms = kms
        self._clock = clock
        self._unwrapped: dict[AuditKey, ECKey] = {}

    async def known(self) -> Mapping[str, ECKey]:
        """Return the keys that can be believed, by key id, the oldest first.

        Raises:
            StoreUnavailable: PostgreSQL or the KMS does not answer.
        """
        return await self._believed(await self._store.list_keys())

    async def signer(self) -> ECKey:
        """Return the newest private key; make the first one if there is none.

        Raises:
            StoreUnavailable: PostgreSQL or the KMS does not answer.
            UnwrapFailed: There are keys, and the KMS has wrapped none of them.
        """
        stored = await self._store.list_keys()
        if not stored:
            await self._store.add_first_key(await self._generate())
            stored = await self._store.list_keys()
        believed = await self._believed(stored)
        if not believed:
            raise UnwrapFailed("none of the audit keys was wrapped by this mesh")
        return list(believed.values())[-1]

    async def rotate(self) -> str:
        """Have a new key sign from now on, and return its id."""
        key = await self._generate()
        await self._store.add_key(key)
        return key.key_id

    async def rewrap(self) -> None:
        """Wrap anew what an older version of the master key wrapped, so that it can be destroyed.

        Raises:
            StoreUnavailable: PostgreSQL or the KMS does not answer.
        """
        newest = await self._kms.newest_version()
        for key in await self._store.list_keys():
            if self._kms.version_of(key.wrapped_private_key) != newest:
                await self._rewrap(key)

    async def _rewrap(self, key: AuditKey) -> None:
        try:
            wrapped = await self._kms.rewrap(key.wrapped_private_key, context=_context(key.key_id))
        except UnwrapFailed:
            log.exception("audit key not believed", key_id=key.key_id)
            return
        await self._store.rewrap_key(key, wrapped)

    async def _believed(self, stored: Sequence[AuditKey]) -> Mapping[str, ECKey]:
        unwrapped = {key: self._unwrapped.get(key) or await self._unwrap(key) for key in stored}
        self._unwrapped = {key: found for key, found in unwrapped.items() if found}
        return {key.key_id: found for key, found in self._unwrapped.items()}

    async def _unwrap(self, key: AuditKey) -> ECKey | None:
        try:
            secret = await self._kms.unwrap(key.wrapped_private_key, context=_context(key.key_id))
        except UnwrapFailed:
            log.exception("audit key not believed", key_id=key.key_id)
            return None
        return ECKey.import_key(json.loads(secret))

    async def _generate(self) -> AuditKey:
        key = ECKey.generate_key("P-256", {"use": "sig", "alg": ALGORITHM}, auto_kid=True)
        key_id = key.thumbprint()
        secret = json.dumps(key.as_dict(private=True)).encode()
        wrapped = await self._kms.wrap(secret, context=_context(key_id))
        return AuditKey(key_id, wrapped, self._clock())


def public_jwk(key: ECKey) -> str:
    """Return the public half as a JSON Web Key (RFC 7517)."""
    return json.dumps(key.as_dict(private=False), sort_keys=True)


def _context(key_id: str) -> bytes:
    return f"audit key {key_id}".encode()
