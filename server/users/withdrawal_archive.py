"""What was withdrawn, kept in S3 as well: a restored backup of the database does not know it."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

import structlog
from joserfc.jwk import ECKey

from server.blobs import Blobs
from server.errors import StoreUnavailable
from server.kms import UnwrapFailed
from server.signed_words import LONGEST_BYTES, Keys, Signer, WordForged
from server.users import withdrawals
from server.users.consent_store import ConsentStore
from server.users.withdrawals import Withdrawal

log = structlog.get_logger()

_AT_ONCE: Final = 100
_PAUSE_SECONDS: Final = 2.0


class WithdrawalArchive:
    """Puts signed words into S3, and has what they say withdrawn again.

    A withdrawal holds from its commit on, whatever becomes of its word. It is acknowledged when
    the word is in every bucket: nothing that was acknowledged is lost with the database. Whoever
    gets no answer is taken care of by `run`, and may ask again.
    """

    def __init__(
        self,
        store: ConsentStore,
        blobs: Blobs,
        signer: Signer,
        keys: Keys,
        *,
        copies: Sequence[Blobs] = (),
    ) -> None:
        """Keep words in a bucket, and in others that outlive it."""
        self._store = store
        self._blobs = blobs
        self._signer = signer
        self._keys = keys
        self._copies = copies

    async def put(self, withdrawal: Withdrawal) -> None:
        """Put the word of a withdrawal into every bucket.

        Raises:
            StoreUnavailable: A store does not answer, or there is no key to sign with. The
                withdrawal holds all the same.
        """
        try:
            await self._put(withdrawal)
        except (StoreUnavailable, UnwrapFailed) as error:
            log.warning("withdrawal not archived", error=repr(error))
            raise StoreUnavailable("the consent is withdrawn; what backups ask of that") from error

    async def run(self) -> NoReturn:
        """Archive again and again. Several processes may: what is there stays as it is."""
        while True:
            try:
                await self.archive()
            except (StoreUnavailable, TimeoutError, UnwrapFailed) as error:
                log.warning("withdrawals not archived", error=repr(error))
            await asyncio.sleep(_PAUSE_SECONDS)

    async def archive(self) -> None:
        """Put the words of what was withdrawn and not acknowledged.

        Raises:
            StoreUnavailable: A store does not answer.
            UnwrapFailed: There is no key to sign with.
        """
        for withdrawal in await self._store.unarchived(_AT_ONCE):
            await self._put(withdrawal)

    async def withdraw_again(self) -> int:
        """Withdraw, in order, whatever S3 knows of and a restored backup does not.

        Returns:
            How many withdrawals it did not know.

        Raises:
            StoreUnavailable: A store does not answer.
            WordForged: Some words are not to be believed, those that it names. The others are.
        """
        keys, count, forged = await self._keys(), 0, list[str]()
        async for page in self._blobs.pages(f"{withdrawals.KIND}/"):
            for key in page:
                try:
                    count += await self._withdraw_again(key, keys)
                except WordForged:
                    forged.append(key)
        if forged:
            raise WordForged(f"not signed by this mesh, nothing withdrawn: {', '.join(forged)}")
        return count

    async def _put(self, withdrawal: Withdrawal) -> None:
        word = withdrawals.sign_word(withdrawal, await self._signer())
        for blobs in (self._blobs, *self._copies):
            await blobs.put_new(withdrawals.object_key(withdrawal), word.encode())
        await self._store.note_archived(withdrawal)

    async def _withdraw_again(self, key: str, keys: Mapping[str, ECKey]) -> bool:
        word = await self._blobs.get_small(key, longest=LONGEST_BYTES)
        withdrawal = withdrawals.read_word(word, keys)
        if withdrawals.object_key(withdrawal) != key:
            raise WordForged
        return await self._store.withdraw_again(withdrawal)
