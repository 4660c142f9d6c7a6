"""Who was erased, kept in S3 as well: a restored backup of the database does not know it."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

import structlog
from joserfc.jwk import ECKey

from server.blobs import Blobs
from server.errors import StoreUnavailable
from server.kms import UnwrapFailed
from server.privacy import words
from server.privacy.erasure_store import ErasureStore
from server.signed_words import LONGEST_BYTES, Keys, Signer, WordForged

log = structlog.get_logger()

_AT_ONCE: Final = 100
_PAUSE_SECONDS: Final = 2.0


class ErasureArchive:
    """Puts signed words into S3, and has the users that they name erased again."""

    def __init__(
        self,
        store: ErasureStore,
        blobs: Blobs,
        signer: Signer,
        keys: Keys,
        *,
        copies: Sequence[Blobs] = (),
    ) -> None:
        """Keep words in a bucket, and in others that outlive it."""
        self._copies = copies
        self._store = store
        self._blobs = blobs
        self._signer = signer
        self._keys = keys

    async def run(self) -> NoReturn:
        """Archive again and again. Several processes may: what is there stays as it is."""
        while True:
            try:
                await self.archive()
            except (StoreUnavailable, TimeoutError, UnwrapFailed) as error:
                log.warning("erasures not archived", error=repr(error))
            await asyncio.sleep(_PAUSE_SECONDS)

    async def archive(self) -> None:
        """Put what S3 does not have yet. Only then an erasure removes anything.

        Raises:
            StoreUnavailable: A store does not answer.
            UnwrapFailed: There is no key to sign with.
        """
        for erasure in await self._store.unarchived(_AT_ONCE):
            word = words.sign_word(erasure, await self._signer())
            for blobs in (self._blobs, *self._copies):
                await blobs.put_new(words.object_key(erasure), word.encode())
            await self._store.note_archived(erasure)

    async def erase_again(self) -> int:
        """Begin anew every erasure that S3 knows of, after a backup was restored.

        Where nothing came back nothing is found, and the erasure ends where it began.

        Returns:
            How many.

        Raises:
            StoreUnavailable: A store does not answer.
            WordForged: Some words are not to be believed, those that it names. The others are.
        """
        keys = await self._keys()
        listed = await self._blobs.list_keys(words.DIRECTORY)
        forged = [key for key in listed if not await self._begin_again(key, keys)]
        if forged:
            raise WordForged(f"not signed by this mesh, and nobody erased: {', '.join(forged)}")
        return len(listed)

    async def _begin_again(self, key: str, keys: Mapping[str, ECKey]) -> bool:
        """Begin an erasure anew whose word is to be believed; tell whether it is."""
        word = await self._blobs.get_small(key, longest=LONGEST_BYTES)
        try:
            erasure = words.read_word(word, keys)
        except WordForged:
            return False
        if words.object_key(erasure) != key:
            return False
        await self._store.begin_again(erasure)
        return True
